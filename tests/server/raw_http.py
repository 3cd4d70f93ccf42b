"""HTTP by hand, for what no client library sends."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import dataclass

from live_server import LiveServer


@dataclass
class Answer:
    """The first answer on a connection. `closed`: the server closed the connection behind it."""

    status: int  # 0: none came
    headers: dict[str, str]
    body: bytes
    closed: bool

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]

    @property
    def message(self) -> str:
        return json.loads(self.body)["error"]["message"]


def connect(server: LiveServer, timeout: float = 10) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def ask(server: LiveServer, *pieces: bytes, timeout: float = 10) -> Answer:
    """Send the pieces on a connection of its own, as far as the server takes them, and read until it closes or pauses."""
    with connect(server, timeout) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        return read(connection)


def read(connection: socket.socket) -> Answer:
    """Read an answer; of one without a length, to the end of the connection."""
    data, closed = b"", False
    while not closed and not _is_whole(data):
        try:
            new = connection.recv(65536)
        except ConnectionError:
            new = b""
        data, closed = data + new, not new
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    closed = closed or headers.get("connection") == "close"
    return Answer(int(lines[0].split()[1]) if data else 0, headers, body, closed)


def _is_whole(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if head.startswith((b"HTTP/1.1 100", b"HTTP/1.1 204")):
        return bool(found)
    length = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(found and ((length and len(body) >= int(length[0])) or body.endswith(b"0\r\n\r\n")))
