"""A client that goes away: its requests are aborted, streaming or not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore, fake_info
from sgl_jax.engine.messages import Abort, Generate, PoolingInfo

LONG = {"max_tokens": 400, "ignore_eos": True, "n": 2}


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def send(server: LiveServer, path: str, body: dict) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | LONG),
        ("/v1/completions", {"prompt": "a"} | LONG),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True, "n": 2}}),
    ],
)
def test_a_client_that_goes_away_is_aborted(path: str, body: dict, stream: bool) -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.01)) as server:
        connection = send(server, path, body | {"stream": stream})
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: sum(isinstance(c, Generate) for c in server.core.commands) == 2)
        connection.close()
        wait_until(lambda: any(isinstance(c, Abort) for c in server.core.commands))
        keys = sorted(c.key for c in server.core.commands if isinstance(c, Generate))
        assert sorted(server.core.commands[-1].keys) == keys
        wait_until(lambda: not server.core.busy)
        assert server.service.num_live == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
        ("/encode", {"text": ["a", "b"]}),
    ],
)
def test_a_client_that_waits_for_vectors_and_goes_away_is_aborted(path: str, body: dict) -> None:
    with LiveServer(lambda: FakeCore(fake_info(pooling=PoolingInfo("embed", 4)), step_seconds=0.5)) as server:
        connection = send(server, path, body)
        wait_until(lambda: server.service.num_live == 2)
        connection.close()
        wait_until(lambda: any(isinstance(c, Abort) for c in server.core.commands))
        assert server.service.num_live == 0


HEAD = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (HEAD + b"Content-Length: 2\r\n\r\n{}", False),
        ((HEAD + b"Content-Length: 2\r\n\r\n{}") * 3, False),
        (HEAD + b"Content-Length: 20\r\n\r\n{", False),
        (HEAD, False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nno length\r\n", True),
    ],
    ids=["whole", "three", "half a body", "half a head", "refused"],
)
def test_a_client_that_goes_with_further_requests_on_their_way_is_aborted(
    more: bytes, refused: bool, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.01)) as server:
        connection = send(server, "/v1/completions", {"prompt": "a", "stream": stream} | LONG)
        wait_until(lambda: sum(isinstance(c, Generate) for c in server.core.commands) == 2)
        connection.sendall(more)
        if not refused:  # then the server closes
            connection.close()
        wait_until(lambda: any(isinstance(c, Abort) for c in server.core.commands))
        wait_until(lambda: not server.core.busy)
        assert server.service.num_live == 0
        assert sum(isinstance(c, Generate) for c in server.core.commands) == 2
        connection.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_stop_string_aborts_what_the_engine_would_go_on_with() -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.01)) as server, server.openai() as client:
        answer = client.completions.create(
            model="stories", prompt="Once upon a time", stop="pon", max_tokens=400, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == " Once u"
        wait_until(lambda: not server.core.busy)
        assert [type(command) for command in server.core.commands] == [Generate, Abort]
