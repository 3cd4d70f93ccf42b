"""A trainer's calls over HTTP: the key, bodies that are refused by name, and requests that wait and go on.

The engine is the real one over a fake device, whose weights are known by a number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import MODEL, LiveServer

from fakes.fake_arrays import FakeArrays
from fakes.fake_runner import kv_chain, token_of
from messages import says
from simulated import make_core

KEY = "secret"
PATHS = (
    "/pause_generation",
    "/continue_generation",
    "/update_weights_from_disk",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
UPDATE = PATHS[2]
MODES = ("abort", "retract", "in_place")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    def core():
        return make_core(arrays=FakeArrays(), eos=2, context_length=512, num_usable_pages=256, step_seconds=0.002)

    with LiveServer(core, api_key=KEY) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(autouse=True)
def goes_on(http: httpx.Client) -> Iterator[None]:
    yield
    for path in ("/resume_memory_occupation", "/continue_generation"):
        assert http.post(path).status_code == 200


def done(answer: httpx.Response, num_paused: int = 0) -> str:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["success"], found["num_paused_requests"]) == (True, num_paused)
    return found["message"]


def generate(http: httpx.Client, number: int, first: int = 5) -> dict[str, Any]:
    """Generate with token ids alone, with the logprobs of the tokens."""
    params = {"max_new_tokens": number, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [first, 6, 7], "sampling_params": params, "return_logprob": True}
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def right(number: int, weights: int, first: int = 5) -> list[int]:
    ids: list[int] = [first, 6, 7]
    for _ in range(number):
        ids.append(token_of(kv_chain(ids, weights), 512))
    return ids[3:]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_needs_the_key(server: LiveServer, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.post(server.url + path, json={"model_path": "7"}, headers=headers)
        assert answer.status_code == 401
    assert not server.service.trainer.holds


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        *((path, {"colour": 1}, "colour") for path in PATHS if path != UPDATE),
        (UPDATE, {"model_path": "7", "colour": 1}, "colour"),
        (UPDATE, {}, "model_path"),
        (UPDATE, {"model_path": ""}, "model_path"),
        (UPDATE, {"model_path": 7}, "model_path"),
        (UPDATE, {"model_path": None}, "model_path"),
        (UPDATE, {"model_path": "a\0b"}, "model_path"),
        (UPDATE, {"model_path": "a\nb"}, "model_path"),
        (UPDATE, {"model_path": "bad"}, "model_path"),
        (UPDATE, {"model_path": "odd"}, "model_path"),
        (UPDATE, {"model_path": "7", "load_format": "dummy"}, "load_format"),
        (UPDATE, {"model_path": "7", "load_format": ["auto"]}, "load_format"),
        (UPDATE, {"model_path": "7", "flush_cache": False}, "flush_cache"),
        (UPDATE, {"model_path": "7", "flush_cache": 0}, "flush_cache"),
        (UPDATE, {"model_path": "7", "abort_all_requests": "yes"}, "abort_all_requests"),
        (UPDATE, {"model_path": "7", "weight_version": 3}, "weight_version"),
        (UPDATE, {"model_path": "7", "weight_version": "a\tb"}, "weight_version"),
        (UPDATE, {"model_path": "7", "weight_version": "v" * 257}, "weight_version"),
        (UPDATE, {"model_path": "7", "is_async": True}, "is_async"),
        (UPDATE, {"model_path": "7", "keep_pause": True}, "keep_pause"),
        (UPDATE, {"model_path": "7", "token_step": 3}, "token_step"),
        ("/pause_generation", {"mode": "soft"}, "mode"),
        ("/pause_generation", {"mode": 1}, "mode"),
        ("/pause_generation", {"mode": ["abort"]}, "mode"),
        ("/continue_generation", {"torch_empty_cache": True}, "torch_empty_cache"),
        *((path, {"tags": []}, "tags") for path in PATHS[3:]),
        *((path, {"tags": ["cuda_graph"]}, "tags[0]") for path in PATHS[3:]),
        *((path, {"tags": "weights"}, "tags") for path in PATHS[3:]),
        *((path, {"tags": ["weights", 1]}, "tags[1]") for path in PATHS[3:]),
        *((path, {"tags": ["weights"] * 3}, "tags") for path in PATHS[3:]),
    ],
)
def test_a_wrong_body_is_refused_by_name(
    server: LiveServer, http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert says(answer.json()["error"]["message"], param.partition("[")[0])
    assert not server.service.trainer.holds


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body", [b"[]", b"7", b'"a"', b"{", b"\xff\xfe", b'{"tags": ["\\ud800"], "model_path": "\\ud800"}']
)
def test_bodies_that_are_no_objects_are_refused(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [path for path in PATHS if path != UPDATE])
@pytest.mark.parametrize("body", [b"", b"{}", b"null"])
def test_a_body_may_be_left_out(http: httpx.Client, path: str, body: bytes) -> None:
    done(http.post(path, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("mode", MODES)
def test_requests_during_a_pause_wait_and_go_on(server: LiveServer, http: httpx.Client, mode: str) -> None:
    weights = server.core.runner.weights  # type: ignore[attr-defined]
    with ThreadPoolExecutor(8) as pool:
        before = [pool.submit(generate, http, 200, first) for first in (11, 12, 13)]
        while server.service.num_live < 3:
            pass
        done(http.post("/pause_generation", json={"mode": mode}), 0 if mode == "abort" else 3)
        during = pool.submit(generate, http, 4)
        while server.service.num_live < (1 if mode == "abort" else 4):
            pass
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        answer = http.get("/health_generate")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert not server.service._has_work()  # the watchdog takes the pause for none of the engine's
        assert not during.done()
        done(http.post("/continue_generation", json={}))
        assert during.result()["output_ids"] == right(4, weights)
        for first, future in zip((11, 12, 13), before, strict=True):
            found = future.result()
            number = len(found["output_ids"])
            assert found["meta_info"]["finish_reason"]["type"] == ("abort" if mode == "abort" else "length")
            assert (number == 200) == (mode != "abort")
            assert found["output_ids"] == right(number, weights, first)


def test_an_update_is_told_by_the_model_s_information(http: httpx.Client) -> None:
    assert http.get("/get_model_info").json()["weight_version"] == "default"
    said = done(http.post(UPDATE, json={"model_path": "3", "weight_version": "step 12", "flush_cache": True}))
    assert said == "The weights are those of 3."
    info = http.get("/get_model_info").json()
    assert (info["model_path"], info["weight_version"], info["tokenizer_path"]) == ("3", "step 12", MODEL)
    [card] = http.get("/v1/models").json()["data"]
    assert (card["id"], card["root"]) == ("stories", "3")
    assert generate(http, 6)["output_ids"] == right(6, 3)
    done(http.post(UPDATE, json={"model_path": "4"}))
    assert http.get("/get_model_info").json()["weight_version"] == "default"
    assert generate(http, 6)["output_ids"] == right(6, 4)


def test_updates_under_load_lose_no_request(server: LiveServer, http: httpx.Client) -> None:
    done(http.post(UPDATE, json={"model_path": "20"}))
    stop, answers = threading.Event(), []

    def ask(first: int) -> None:
        while not stop.is_set():
            answers.append(generate(http, 30, first))

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, first) for first in range(11, 17)]
        for number in range(21, 31):
            done(http.post(UPDATE, json={"model_path": str(number)}))
        stop.set()
        for each in asking:
            each.result()
    assert len(answers) >= 6
    for answer in answers:
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
        assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) == 30
    assert generate(http, 9, 11)["output_ids"] == right(9, 30, 11)
    assert server.service.num_live == 0


def test_memory_is_released_when_nothing_runs(server: LiveServer, http: httpx.Client) -> None:
    weights = server.core.runner.weights  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(generate, http, 200)
        while not server.service.num_live:
            pass
        answer = http.post("/release_memory_occupation", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert says(answer.json()["error"]["message"], "requests are live … pause")
        assert running.result()["output_ids"] == right(200, weights)
        assert done(http.post("/release_memory_occupation", json={"tags": ["kv_cache"]})) == "Released: kv_cache."
        done(http.post("/release_memory_occupation"))
        waiting = pool.submit(generate, http, 7)
        while not server.service.num_live:
            pass
        http.post("/flush_cache").raise_for_status()
        assert done(http.post("/resume_memory_occupation", json={"tags": ["weights"]}), 1) == "Released: kv_cache."
        assert done(http.post("/resume_memory_occupation", json={})) == "Released: nothing."
        assert waiting.result()["output_ids"] == right(7, weights)
