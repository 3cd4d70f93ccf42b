"""Profiles, asked for over HTTP."""

from __future__ import annotations

import httpx
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from fakes.fake_tracer import DEFAULT, UNWRITABLE
from messages import says


def test_an_engine_that_dies_meanwhile_is_an_answer_too() -> None:
    class Dies(FakeCore):
        def handle(self, command):
            raise RuntimeError("the device is lost")

    with LiveServer(Dies) as server, server.http() as http:
        answer = http.post("/start_profile")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


def test_a_profile_of_so_many_steps(http: httpx.Client) -> None:
    started = http.post("/start_profile", json={"output_dir": "/traces", "num_steps": 2})
    assert started.status_code == 200
    assert (started.json()["running"], started.json()["output_dir"]) == (True, "/traces")
    http.post("/generate", json={"text": "Once upon a time"})
    status = http.get("/profile_status").json()
    assert (status["running"], status["steps_done"], status["files"]) == (False, 2, ["/traces/fake.xplane.pb"])
    refused = http.post("/stop_profile")
    assert refused.status_code == 409
    assert says(refused.json()["error"]["message"], "2 steps … /traces")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_profile_until_it_is_stopped(http: httpx.Client, method: str) -> None:
    assert http.request(method, "/start_profile").json()["output_dir"] == DEFAULT
    refused = http.request(method, "/start_profile")
    assert refused.status_code == 409
    assert says(refused.json()["error"]["message"], "profile is running")
    answer = http.post("/generate", json={"text": "Once", "sampling_params": {"max_new_tokens": 1}})
    assert answer.status_code == 200
    stopped = http.request(method, "/stop_profile")
    assert stopped.status_code == 200
    assert (stopped.json()["running"], stopped.json()["steps_done"]) == (False, 1)
    assert stopped.json()["files"] == [f"{DEFAULT}/fake.xplane.pb"]
    assert http.request(method, "/stop_profile").status_code == 409


def test_what_is_asked_for_reaches_the_tracer_and_nothing_is_left_to_it_otherwise() -> None:
    with LiveServer() as server, server.http() as http:
        http.post("/start_profile", json={"host_tracer_level": 1, "python_tracer_level": 0})
        assert server.core.tracer.options == (1, 0)
        http.post("/stop_profile")
        http.post("/start_profile", json={})
        assert server.core.tracer.options == (None, None)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"steps": 3}, "steps", "unknown_parameter"),
        ({"num_steps": 0}, "num_steps", "invalid_value"),
        ({"num_steps": "3"}, "num_steps", "invalid_value"),
        ({"output_dir": ""}, "output_dir", "invalid_value"),
        ({"output_dir": UNWRITABLE}, "output_dir", "invalid_value"),
        ({"host_tracer_level": 4}, "host_tracer_level", "invalid_value"),
        ({"python_tracer_level": 2}, "python_tracer_level", "invalid_value"),
        ({"start_step": 3}, "start_step", "unsupported_parameter"),
        ({"activities": ["GPU"]}, "activities", "unsupported_parameter"),
        ({"profile_by_stage": True}, "profile_by_stage", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, body: dict, param: str, code: str) -> None:
    answer = http.post("/start_profile", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert not http.get("/profile_status").json()["running"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_parameters_in_the_url_are_refused_not_ignored(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/start_profile?num_steps=1")
    found = answer.json()["error"]
    assert (answer.status_code, found["param"], found["code"]) == (400, "num_steps", "unknown_parameter")
    assert found["type"] == "invalid_request_error"
    assert says(found["message"], "num_steps … URL … JSON")
    assert not http.get("/profile_status").json()["running"]


def test_fields_of_other_clients_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    assert http.post("/start_profile", json={"profile_by_stage": False, "activities": None}).status_code == 200
    assert http.post("/stop_profile").status_code == 200


def test_a_profile_that_runs_at_the_end_is_written() -> None:
    with LiveServer() as server, server.http() as http:
        http.post("/start_profile")
    assert server.core.tracer.num_stopped == 1


def test_the_api_key_guards_all_of_it() -> None:
    with LiveServer(api_key="secret") as server, server.http() as http:
        for method, path in (
            ("POST", "/start_profile"),
            ("GET", "/start_profile"),
            ("POST", "/stop_profile"),
            ("GET", "/profile_status"),
        ):
            assert http.request(method, path).status_code == 401
