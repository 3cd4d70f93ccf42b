"""Tests of how pages and their files are served, and of the libraries that lie beside them."""

from __future__ import annotations

import gzip
import hashlib
import re
from importlib import resources
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from live_server import LiveServer

WEB = Path(str(resources.files("sgl_jax.server"))) / "web"
SERVED = sorted(file for file in WEB.rglob("*") if file.suffix in (".html", ".css", ".js"))


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_a_page_loads_nothing_from_elsewhere(http: httpx.Client, path: str) -> None:
    page = http.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    files = [address for address in addresses if not address.startswith("data:")]
    assert files
    assert not [file for file in files if "//" in file or file.startswith("/")], "pages work under a path prefix"
    for file in files:
        assert http.get("/" + file.removeprefix("./")).status_code == 200


@pytest.mark.parametrize("file", SERVED, ids=lambda file: file.name)
def test_every_file_is_served_compressed_and_kept(http: httpx.Client, file: Path) -> None:
    path = f"/web/{file.relative_to(WEB)}"
    plain = http.get(path, headers={"accept-encoding": "identity"})
    assert plain.content == file.read_bytes()
    with http.stream("GET", path, headers={"accept-encoding": "gzip"}) as packed:
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(packed.iter_raw())) == plain.content
    assert http.get(path, headers={"if-none-match": plain.headers["etag"]}).status_code == 304
    assert http.head(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "to"), [("/dashboard/", "../dashboard"), ("/dashboard//", "../../dashboard"), ("//", "../")]
)
def test_a_slash_behind_a_page_leads_to_the_page(live: LiveServer, path: str, to: str) -> None:
    answer = httpx.get(live.url + path)
    assert (answer.status_code, answer.headers["location"]) == (307, to)
    assert urljoin(live.url + path, to) == live.url + (path.rstrip("/") or "/")


def test_no_ui_serves_none() -> None:
    with LiveServer(no_ui=True) as server, server.http() as http:
        assert [http.get(path).status_code for path in ("/", "/dashboard", "/web/chat.js")] == [404] * 3


def test_pages_need_no_key_and_what_they_show_does() -> None:
    with LiveServer(api_key="secret") as server:
        statuses = {path: httpx.get(server.url + path).status_code for path in ("/", "/web/chat.js", "/v1/models")}
    assert statuses == {"/": 200, "/web/chat.js": 200, "/v1/models": 401}


def test_libraries_are_as_they_were_published() -> None:
    stated = dict(
        re.findall(r"^\| `(\S+)` .* `(\w{64})` \|$", (WEB / "vendor" / "README.md").read_text(), re.MULTILINE)
    )
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (WEB / "vendor").iterdir()
        if file.suffix in (".js", ".css")
    }
    assert found == stated


def test_pages_weigh_little() -> None:
    """The limits are for all files together as they are sent, and for what the chat page loads as it is on the disk."""
    assert sum(len(gzip.compress(file.read_bytes())) for file in SERVED) <= 90_000
    chat = [file for file in SERVED if not file.name.startswith(("dashboard", "uplot"))]
    assert sum(file.stat().st_size for file in chat) <= 150_000
