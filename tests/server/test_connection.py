"""Limits on what a client sends and how long it takes, old clients, and connections that bring no HTTP."""

from __future__ import annotations

import json
import random
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer
from raw_http import Answer, ask, connect, read

from messages import says
from sgl_jax.server.connection import most_connections

HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
BODY = json.dumps({"text": "Once", "sampling_params": {"max_new_tokens": 2}}).encode()
MEBIBYTE = 2**20


def post(body: bytes, headers: bytes = b"", path: bytes = b"/generate", version: bytes = b"1.1") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST %b HTTP/%b\r\n" % (path, version) + HOST + JSON + length + headers + b"\r\n" + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    head = b"POST /generate HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))[:-2] + trailer + b"\r\n"


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    """Serve with a key, which none of these requests has, and a limit of one MiB."""
    with LiveServer(api_key="secret", max_request_bytes=MEBIBYTE) as server:
        yield server


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    with LiveServer(max_request_bytes=MEBIBYTE) as server:
        yield server


def resident() -> int:
    """Bytes of memory that this process, in which the server runs, has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def endless(piece: bytes) -> list[bytes]:
    return [piece * (MEBIBYTE // len(piece))] * 30


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ([b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"], 414, "uri_too_long"),
        ([b"GET /", *endless(b"a")], 414, "uri_too_long"),
        ([b"GET /?a=", *endless(b"b")], 414, "uri_too_long"),
        ([b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"b" * 66_000 + b"\r\n\r\n"], 431, "head_too_large"),
        ([b"GET / HTTP/1.1\r\nA: ", *endless(b"b")], 431, "head_too_large"),
        ([b"GET / HTTP/1.1\r\n", *endless(b"a")], 431, "head_too_large"),
        ([b"GET / HTTP/1.1\r\n", *endless(b"A: b\r\n")], 431, "head_too_large"),
        ([b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 256 + b"\r\n"], 431, "head_too_large"),
        ([post(b"", b"Transfer-Encoding: chunked\r\n")], 400, "bad_http"),
        ([post(b"{}")[:-2].replace(b"Length: 2", b"Length: %d" % (MEBIBYTE + 1))], 413, "body_too_large"),
        ([post(b"{}")[:-2].replace(b"Length: 2", b"Length: %d" % 2**62)], 413, "body_too_large"),
        ([b"\r\n" * 10_000_000], 431, "head_too_large"),
    ],
)  # fmt: skip
def test_limits_are_looked_at_before_the_key_and_before_anything_is_kept(
    guarded: LiveServer, pieces: list[bytes], status: int, code: str
) -> None:
    before = resident()
    answer = ask(guarded, *pieces)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["x-request-id"]
    assert resident() - before < 8 * MEBIBYTE


def test_the_largest_head_is_taken(guarded: LiveServer) -> None:
    answer = ask(guarded, b"GET /health HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 254 + b"C: " + b"d" * 60_000 + b"\r\n\r\n")
    assert answer.status == 200


@pytest.mark.parametrize(
    "pieces",
    [
        [chunked(BODY)[:-5], b"2;" , *endless(b"x")],
        [chunked(BODY)[:-2] + b"A: ", *endless(b"b")],
        [chunked(BODY)[:-2], *endless(b"A: b\r\n")],
    ],
    ids=["extension", "trailer", "trailers"],
)  # fmt: skip
def test_what_lies_between_and_behind_chunks_has_the_limit_of_a_head(small: LiveServer, pieces: list[bytes]) -> None:
    before = resident()
    answer = ask(small, *pieces)
    assert (answer.status, answer.code) == (431, "head_too_large")
    assert resident() - before < 8 * MEBIBYTE


def test_a_trailer_is_no_header(guarded: LiveServer) -> None:
    answer = ask(guarded, chunked(BODY, trailer=b"Authorization: Bearer secret\r\n"))
    assert (answer.status, answer.code) == (401, "invalid_api_key")


def test_a_body_over_the_limit_is_told_so_by_its_length_and_as_it_comes(small: LiveServer) -> None:
    with small.http() as http:
        fits = http.post(
            "/generate", content=BODY + b" " * (MEBIBYTE - len(BODY)), headers={"Content-Type": "application/json"}
        )
        assert fits.status_code == 200
        told = http.post("/generate", content=BODY + b" " * MEBIBYTE, headers={"Content-Type": "application/json"})
        assert told.status_code == 413
        assert says(told.json()["error"]["message"], f"{MEBIBYTE + len(BODY)} … {MEBIBYTE} … --max-request-bytes")
        again = http.post("/generate", content=BODY, headers={"Content-Type": "application/json"})
        assert again.status_code == 200
    answer = ask(small, chunked(*[b" " * 65536] * 17))
    assert (answer.status, answer.code) == (413, "body_too_large")


def pour(connection: socket.socket, chunk: bytes) -> None:
    for _ in range(100):
        connection.sendall(chunk)


def test_a_body_without_end_is_cut_and_costs_no_memory(small: LiveServer) -> None:
    head, chunk = chunked().removesuffix(b"0\r\n\r\n"), b"%x\r\n%b\r\n" % (MEBIBYTE, b" " * MEBIBYTE)
    for path in (b"/generate", b"/flush_cache", b"/nothing"):
        before = resident()
        with connect(small) as connection:
            connection.sendall(head.replace(b"/generate", path))
            with pytest.raises(ConnectionError):
                pour(connection, chunk)
        assert resident() - before < 16 * MEBIBYTE


@pytest.fixture(scope="module")
def hasty() -> Iterator[LiveServer]:
    limits = {"head_s": 0.3, "body_s": 0.3, "bytes_per_s": 1000, "connections": 20}
    with LiveServer(limits=limits) as server:
        yield server


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\n", b"A: b\r\n"),
        (b"", b"\r\n"),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", b"\r\n"),
        (post(BODY)[:-1], b""),
        (post(b" " * 5000)[:-4000], b" "),
    ],
    ids=["nothing", "line", "headers", "empty lines", "second request", "body", "slow body"],
)
def test_a_request_that_does_not_arrive_in_time_is_a_408(hasty: LiveServer, begun: bytes, more: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(begun)
        if b"/health" in begun:
            assert read(connection).status == 200
        started = time.monotonic()
        while time.monotonic() < started + 5 and more:
            try:
                connection.sendall(more)
            except ConnectionError:
                break
            time.sleep(0.05)
            if hasty_has_answered(connection):
                break
        answer = read(connection)
        assert time.monotonic() - started < 4
    assert (answer.status, answer.code, answer.closed) == (408, "request_timeout", True)


def hasty_has_answered(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) is not None
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(10)


def test_a_body_that_keeps_its_rate_may_take_longer(hasty: LiveServer) -> None:
    with connect(hasty) as connection:
        body = BODY + b" " * 3000
        connection.sendall(post(body)[: -len(body)])
        for start in range(0, len(body), 100):
            connection.sendall(body[start : start + 100])
            time.sleep(0.025)
        assert read(connection).status == 200


def test_connections_over_the_limit_are_refused_and_there_is_room_again(hasty: LiveServer) -> None:
    connections = [connect(hasty) for _ in range(20)]
    time.sleep(0.1)
    refused = ask(hasty)
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "too_many_connections", "1")
    for each in connections:
        each.close()
    time.sleep(0.1)
    assert httpx.get(f"{hasty.url}/health").status_code == 200


def test_descriptors_are_left_for_the_server() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert most_connections() == min(hard - 64, 16384)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_client_of_http_1_0_gets_no_chunks_and_the_end_of_the_connection(small: LiveServer) -> None:
    stream = json.dumps({"text": "Once", "stream": True}).encode()
    answer = ask(small, post(stream, version=b"1.0"))
    assert (answer.status, answer.closed) == (200, True)
    assert "transfer-encoding" not in answer.headers
    assert "content-length" not in answer.headers
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")
    for headers in (b"", HOST, HOST + b"Connection: keep-alive\r\n"):
        answer = ask(small, b"GET /v1/models HTTP/1.0\r\n" + headers + b"\r\n")
        assert (answer.status, answer.closed) == (200, True)
        assert len(answer.body) == int(answer.headers["content-length"])
    assert ask(small, post(BODY, b"Expect: 100-continue\r\n", version=b"1.0")).status == 200


def test_a_client_that_asks_before_it_sends_its_body(small: LiveServer) -> None:
    expecting = post(BODY, b"Expect: 100-continue\r\n").removesuffix(BODY)
    with connect(small) as connection:
        connection.sendall(expecting)
        assert read(connection).status == 100
        connection.sendall(BODY)
        answer = read(connection)
        assert (answer.status, answer.closed) == (200, False)
    large = ask(small, expecting.replace(b"Length: %d" % len(BODY), b"Length: %d" % (2 * MEBIBYTE)))
    assert (large.status, large.closed) == (413, True)  # its body does not come, and nothing could follow


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
        (post(BODY, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"), 200),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)  # fmt: skip
def test_odd_but_right_requests_are_answered_and_wrong_ones_are_400(
    small: LiveServer, request_: bytes, status: int
) -> None:
    answer = ask(small, request_)
    assert answer.status == status
    if status == 400:
        assert answer.code == "bad_http"


def test_requests_in_one_go_are_answered_in_their_order(small: LiveServer) -> None:
    with connect(small) as connection:
        connection.sendall(post(BODY) + b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n" + b"junk\r\n\r\n")
        data = b""
        while new := connection.recv(65536):
            data += new
    first, second, third = data.split(b"HTTP/1.1 ")[1:]
    assert (first[:3], second[:3], third[:3]) == (b"200", b"200", b"400")
    assert b'"output_ids"' in first
    assert b'"version"' in second
    assert b"bad_http" in third


GARBAGE = (
    b"GET / HTTP/1.1\r\n" + HOST + b"\r\n",
    post(BODY),
    post(BODY, b"Expect: 100-continue\r\n"),
    chunked(BODY[:10], BODY[10:]),
    post(json.dumps({"prompt": "a", "stream": True, "max_tokens": 2}).encode(), path=b"/v1/completions"),
    b"OPTIONS /v1/models HTTP/1.1\r\n" + HOST + b"Origin: http://localhost\r\n\r\n",
)


def damaged(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(GARBAGE))
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.randrange(8))
        new = [
            chance.randbytes(4),
            b"\r\n",
            b"\0",
            b":" * 9,
            b"0x1",
            b"-1",
            b"99999999999999999999",
            bytes(data[start:end]) * 3,
        ]
        data[start:end] = chance.choice(new)
    return bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data) + 1)))])


def test_damaged_requests_break_nothing(hasty: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(15)
    before = resident()
    for _ in range(300):
        answer = ask_and_leave(hasty, damaged(chance))
        assert answer.status < 500
    assert not [record for record in caplog.records if record.exc_info]
    assert resident() - before < 16 * MEBIBYTE
    assert httpx.post(f"{hasty.url}/generate", content=BODY, headers={"Content-Type": "application/json"}).json()[
        "text"
    ]


def ask_and_leave(server: LiveServer, data: bytes) -> Answer:
    """Ask, and send no more, so that an answer or the end of the connection comes soon."""
    with connect(server) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read(connection)
