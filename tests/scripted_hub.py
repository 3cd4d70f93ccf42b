"""Both hubs, scripted, on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": []}',
    "model.safetensors": bytes(range(256)) * 40,
    "original/model.safetensors": b"the same again",
    "README.md": b"# no",
}


class Hub(ThreadingHTTPServer):
    """Both hubs' paths for one model, org/model. Breaks the first transfer of the weights in the middle."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(FILES)
        self.listed_sha256: str | None = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        self.listed_beside: list = []
        self.seen: list[tuple[str, str, str | None]] = []  # method, what, Range
        self.authorizations: set[str | None] = set()
        self.breaks = 1
        self.store: str | None = None  # another host, to which ModelScope's files are redirected
        self.breaks_at = 5000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def transfers(self, name: str) -> list[str | None]:
        return [span for method, what, span in self.seen if method == "GET" and what == name]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, url = self.server, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        hub.authorizations.add(self.headers.get("Authorization"))
        if url.path == "/api/v1/models/org/model/repo/files":
            shas = {"model.safetensors": hub.listed_sha256}
            listed: list = [
                {"Path": n, "Size": len(b), "Type": "blob", "Sha256": shas.get(n)} for n, b in hub.files.items()
            ]
            listed += hub.listed_beside
            self._json(
                {"Code": 200, "Data": {"Files": [*listed, {"Path": "original", "Size": 0, "Type": "tree"}]}}, body
            )
        elif url.path == "/api/v1/models/org/model/repo" and hub.store and "Stored" not in query:
            self._bytes(b"", body, {"Location": f"{hub.store}{self.path}&Stored=1"}, status=302)
        elif url.path == "/api/v1/models/org/model/repo":
            self._file(query["FilePath"], body)
        elif url.path.startswith("/api/models/org/model/tree/"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in hub.files.items()]
            self._json(entries, body)
        elif url.path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in hub.files.items()]
            self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings}, body)
        elif url.path.startswith("/org/model/resolve/"):
            self._file(url.path.split("/", 5)[5], body)
        else:
            self.send_error(404)

    def _json(self, value: object, body: bool) -> None:
        self._bytes(json.dumps(value).encode(), body, {"Content-Type": "application/json"})

    def _file(self, name: str, body: bool) -> None:
        hub, span = self.server, self.headers.get("Range")
        hub.seen.append((self.command, name, span))
        content = hub.files[name]
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if body and name == "model.safetensors" and hub.breaks:
            hub.breaks -= 1
            self._bytes(content, body, headers, stop_after=hub.breaks_at)
        else:
            self._bytes(content[start:], body, headers, status=206 if span else 200)

    def _bytes(
        self, content: bytes, body: bool, headers: dict, status: int = 200, stop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:stop_after])
        if stop_after is not None:
            self.close_connection = True


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
