"""Web pages of the server, chat at / and a dashboard at /dashboard, and the files that they load from /web.

They hold no data: all that they show comes from the API, with the key if one is set, which the page asks for. So they are
served without it. Nothing is loaded from another site, and no script may stand inside a page.
"""

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.responses import Response

PAGES = {"/": "chat.html", "/dashboard": "dashboard.html"}
FOLDER = "/web/"  # path of the files that pages load
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks each time whether its copy is still right
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    compressed: bytes
    headers: dict[str, str]

    def answer(self, asked: Headers) -> Response:
        if self.headers["ETag"] in asked.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        if "gzip" in asked.get("accept-encoding", ""):
            return Response(self.compressed, headers=self.headers | {"Content-Encoding": "gzip"})
        return Response(self.content, headers=self.headers)


def install(app: FastAPI) -> None:
    """Serve the pages and their files."""
    files = _read()

    def add(path: str, file: _File) -> None:
        async def page(request: Request) -> Response:
            return _without_slash(request) or file.answer(request.headers)

        app.add_route(path, page, include_in_schema=False)

    for name, file in files.items():
        add(FOLDER + name, file)
    for path, name in PAGES.items():
        add(path, files[name])


def is_page(path: str) -> bool:
    """Say whether a path is that of a page or of a file that pages load."""
    return path in PAGES or path.startswith(FOLDER)


def _without_slash(request: Request) -> Response | None:
    """Send a browser that asked with slashes behind the path to the one without, which the page's addresses are beside.

    The way there is relative, as a proxy may have put a path in front.
    """
    raw: bytes = request.scope["raw_path"]
    slashes = len(raw) - len(raw.rstrip(b"/")) - (request.scope["path"] == "/")
    if slashes <= 0:
        return None
    name = request.scope["path"].rpartition("/")[2]
    return Response(status_code=307, headers={"Location": "../" * slashes + name, "Cache-Control": "no-cache"})


def _read() -> dict[str, _File]:
    """Return the files of the folder `web`, by their paths in it."""
    found: dict[str, _File] = {}
    folders = [("", resources.files("sgl_jax.server").joinpath("web"))]
    for prefix, folder in folders:
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            elif kind := _TYPES.get(PurePosixPath(entry.name).suffix):
                content = entry.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                headers = _HEADERS | {"Content-Type": kind, "ETag": etag}
                found[prefix + entry.name] = _File(content, gzip.compress(content, mtime=0), headers)
    return found
