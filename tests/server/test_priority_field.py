"""Priorities over HTTP: every API takes one, and a server that serves by arrival refuses it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore, fake_info
from messages import says
from sgl_jax.engine.messages import Generate, PoolingInfo

ASKS = [
    ("/generate", {"input_ids": [5, 6], "sampling_params": {"priority": 7, "max_new_tokens": 1}}),
    ("/generate", {"input_ids": [5, 6], "priority": 7, "sampling_params": {"max_new_tokens": 1}}),
    ("/generate", {"input_ids": [[5, 6]], "priority": 3, "sampling_params": [{"priority": 7}]}),
    ("/v1/completions", {"prompt": [5, 6], "priority": 7}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "priority": 7}),
    ("/v1/responses", {"input": "a", "priority": 7}),
    (
        "/v1/messages",
        {"model": "default", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "priority": 7},
    ),
]
OF_VECTORS = [
    ("/v1/embeddings", {"input": "a", "priority": 7}),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "a"}], "priority": 7}),
    ("/rerank", {"query": "a", "documents": ["b"], "priority": 7}),
    ("/score", {"text_1": "a", "text_2": "b", "priority": 7}),
    ("/encode", {"text": ["a", "b"], "priority": 7}),
]


EMBEDS = PoolingInfo("embed", 4)


@pytest.fixture(scope="module")
def cores() -> list[FakeCore]:
    return []


@pytest.fixture(scope="module")
def http(cores: list[FakeCore]) -> Iterator[httpx.Client]:
    def make() -> FakeCore:
        cores.append(FakeCore(fake_info(priority_sign=1)))
        return cores[-1]

    with LiveServer(make) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), ASKS)
def test_the_engine_gets_a_requests_priority(http: httpx.Client, cores: list[FakeCore], path: str, body: dict) -> None:
    assert http.post(path, json=body).status_code == 200
    last = [each for each in cores[-1].commands if isinstance(each, Generate)][-1]
    assert last.params.priority == 7


@pytest.mark.parametrize("value", [2**31, -(10**25), "high", 1.5])
def test_a_value_that_is_no_priority_is_refused_by_name(http: httpx.Client, value: object) -> None:
    for path, body in (("/v1/completions", {"prompt": [5]}), ("/generate", {"input_ids": [5]})):
        answer = http.post(path, json=body | {"priority": value})
        assert answer.status_code == 400, path
        assert "priority" in answer.json()["error"]["message"]


def test_parameters_with_a_priority_of_0_keep_it(http: httpx.Client, cores: list[FakeCore]) -> None:
    body = {"input_ids": [[5], [6]], "priority": 7, "sampling_params": [{"priority": 0}, {}]}
    assert http.post("/generate", json=body).status_code == 200
    last = [each for each in cores[-1].commands if isinstance(each, Generate)][-2:]
    assert [each.params.priority for each in last] == [0, 7]


def test_a_request_for_vectors_has_a_priority() -> None:
    with LiveServer(lambda: FakeCore(fake_info(priority_sign=1, pooling=EMBEDS))) as server, server.http() as client:
        for path, body in OF_VECTORS:
            assert client.post(path, json=body).status_code == 200, path
            last = [each for each in server.core.commands if isinstance(each, Generate)][-1]
            assert last.params.priority == 7, path
    with LiveServer(lambda: FakeCore(fake_info(pooling=EMBEDS))) as server, server.http() as client:
        for path, body in OF_VECTORS:
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority"), path
            assert "--schedule-policy priority" in answer.text
            assert client.post(path, json=body | {"priority": 0}).status_code == 200, path


@pytest.mark.parametrize("stream", [False, True])
def test_a_more_urgent_request_takes_a_place_in_a_full_queue(stream: bool) -> None:
    core = lambda: FakeCore(fake_info(priority_sign=1), step_seconds=0.5)  # noqa: E731
    with LiveServer(core, max_queued_requests=1) as server, server.http() as client, ThreadPoolExecutor() as threads:
        body = {"input_ids": [5, 6], "stream": stream, "sampling_params": {"max_new_tokens": 1}}
        waiting = threads.submit(lambda: httpx.post(f"{server.url}/generate", json=body, timeout=20))
        while server.service.num_live == 0:
            time.sleep(0.002)
        assert client.post("/generate", json=body | {"stream": False}).status_code == 429
        assert client.post("/generate", json=body | {"stream": False, "priority": 1}).status_code == 200
        refused = waiting.result()
    assert refused.status_code == (200 if stream else 429)
    assert stream or int(refused.headers["retry-after"]) >= 1
    error = json.loads(refused.text.removeprefix("data: "))["error"]
    assert error["code"] == "queue_full"
    assert says(error["message"], "more urgent … 1 … --max-queued-requests")


def test_a_server_that_serves_by_arrival_names_the_flag() -> None:
    with LiveServer(FakeCore) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        for path, body in ASKS:
            answer = client.post(path, json=body)
            assert answer.status_code == 400, path
            assert "--schedule-policy priority" in answer.text
        zero = {"prompt": [5, 6], "priority": 0}
        assert client.post("/v1/completions", json=zero).status_code == 200
