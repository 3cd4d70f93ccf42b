"""What the machine can do, asked over HTTP."""

from __future__ import annotations

import httpx
import msgspec
from live_server import LiveServer

from sgl_jax.testing.fake_core import FAKE_LIMITS, FakeCore


def test_limits_of_the_machine(http: httpx.Client) -> None:
    answer = http.post("/measure_limits")
    assert (answer.status_code, answer.json()) == (200, msgspec.to_builtins(FAKE_LIMITS))
    assert http.get("/measure_limits").status_code == 405
    assert http.get("/get_server_info").json()["engine"]["parameters_per_token"] == 0


def test_limits_are_not_measured_while_a_request_runs(slow: LiveServer) -> None:
    body = {"text": "Once", "sampling_params": {"ignore_eos": True, "max_new_tokens": 400}, "stream": True}
    with slow.http() as http, slow.http() as other:
        with http.stream("POST", "/generate", json=body) as stream:
            next(stream.iter_lines())
            refused = other.post("/measure_limits")
        assert refused.status_code == 409
        assert refused.json()["error"] == {
            "message": "1 requests run; ask again when there are none",
            "type": "invalid_request_error",
            "param": None,
            "code": "conflict",
        }


def test_an_engine_that_dies_meanwhile_is_an_answer_too() -> None:
    class Dies(FakeCore):
        def handle(self, command):
            raise RuntimeError("the device is lost")

    with LiveServer(Dies) as server, server.http() as http:
        answer = http.post("/measure_limits")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


def test_the_api_key_guards_it() -> None:
    with LiveServer(api_key="secret") as server, server.http() as http:
        assert http.post("/measure_limits").status_code == 401
