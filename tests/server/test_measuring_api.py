"""Profiles, asked for over HTTP."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from messages import says

JSON = {"Content-Type": "application/json"}


def test_an_engine_that_dies_meanwhile_is_an_answer_too(folder: Path) -> None:
    class Dies(FakeCore):
        def handle(self, command):
            raise RuntimeError("the device is lost")

    with LiveServer(Dies, profiler_dir=str(folder)) as server, server.http() as http:
        answer = http.post("/start_profile")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles").resolve()


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[httpx.Client]:
    with LiveServer(profiler_dir=str(folder)) as server, server.http() as client:
        yield client


def test_a_profile_of_so_many_steps(http: httpx.Client, folder: Path) -> None:
    started = http.post("/start_profile", json={"num_steps": 2})
    assert started.status_code == 200
    assert (started.json()["running"], started.json()["output_dir"]) == (True, str(folder))
    http.post("/generate", json={"text": "Once upon a time"})
    while (status := http.get("/profile_status").json())["running"]:
        pass
    assert (status["running"], status["steps_done"], status["files"]) == (False, 2, [f"{folder}/fake.xplane.pb"])
    refused = http.post("/stop_profile")
    assert refused.status_code == 409
    assert says(refused.json()["error"]["message"], f"2 steps … {folder}")


def test_a_profile_until_it_is_stopped(http: httpx.Client, folder: Path) -> None:
    assert http.post("/start_profile").json()["output_dir"] == str(folder)
    refused = http.post("/start_profile")
    assert refused.status_code == 409
    assert says(refused.json()["error"]["message"], "profile is running")
    answer = http.post("/generate", json={"text": "Once", "sampling_params": {"max_new_tokens": 1}})
    assert answer.status_code == 200
    stopped = http.post("/stop_profile")
    assert stopped.status_code == 200
    assert (stopped.json()["running"], stopped.json()["steps_done"]) == (False, 1)
    assert stopped.json()["files"] == [f"{folder}/fake.xplane.pb"]
    assert http.post("/stop_profile").status_code == 409


def test_what_is_asked_for_reaches_the_tracer_and_nothing_is_left_to_it_otherwise(folder: Path) -> None:
    with LiveServer(profiler_dir=str(folder)) as server, server.http() as http:
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
        ({"num_steps": 201}, "num_steps", "invalid_value"),
        ({"num_steps": "3"}, "num_steps", "invalid_value"),
        ({"output_dir": ""}, "output_dir", "invalid_value"),
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


def test_a_link_cannot_start_or_stop_a_profile(http: httpx.Client) -> None:
    for method in ("GET", "HEAD"):
        for path in ("/start_profile", "/stop_profile"):
            answer = http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")


def test_without_a_folder_profiles_are_off() -> None:
    with LiveServer() as server, server.http() as http:
        for body in (None, {"output_dir": "/tmp/traces"}, {"num_steps": 1}):
            answer = http.post("/start_profile", json=body)
            assert answer.status_code == 409
            assert says(answer.json()["error"]["message"], "profiles are off … --profiler-dir")
        assert server.core.commands == []


def test_a_folder_inside_the_allowed_one_may_be_named_in_any_way(http: httpx.Client, folder: Path) -> None:
    (folder / "inside").symlink_to(folder / "a")
    for asked, found in {"a/b": "a/b", f"{folder}/c": "c", "a/../d": "d", "inside/e": "a/e", ".": ""}.items():
        assert http.post("/start_profile", json={"output_dir": asked}).json()["output_dir"] == str(folder / found)
        assert http.post("/stop_profile").status_code == 200


@pytest.mark.parametrize("asked", ["/tmp", "..", "a/../../b", "{folder}-b", "out/a", "/", "a\0b", "\ud800"])
def test_a_profile_is_written_nowhere_else(http: httpx.Client, folder: Path, asked: str) -> None:
    with contextlib.suppress(FileExistsError):
        (folder / "out").symlink_to("/tmp")
    asked = asked.format(folder=folder)
    answer = http.post("/start_profile", content=json.dumps({"output_dir": asked}), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "output_dir")
    assert not http.get("/profile_status").json()["running"]


def test_parameters_in_the_url_are_refused_not_ignored(http: httpx.Client) -> None:
    answer = http.post("/start_profile?num_steps=1")
    found = answer.json()["error"]
    assert (answer.status_code, found["param"], found["code"]) == (400, "num_steps", "unknown_parameter")
    assert found["type"] == "invalid_request_error"
    assert says(found["message"], "num_steps … URL … JSON")
    assert not http.get("/profile_status").json()["running"]


def test_fields_of_other_clients_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    assert http.post("/start_profile", json={"profile_by_stage": False, "activities": None}).status_code == 200
    assert http.post("/stop_profile").status_code == 200


def test_a_profile_that_runs_at_the_end_is_written(folder: Path) -> None:
    with LiveServer(profiler_dir=str(folder)) as server, server.http() as http:
        http.post("/start_profile")
    assert server.core.tracer.num_stopped == 1


def test_the_api_key_guards_all_of_it() -> None:
    with LiveServer(api_key="secret") as server, server.http() as http:
        for method, path in (
            ("POST", "/start_profile"),
            ("POST", "/stop_profile"),
            ("GET", "/profile_status"),
        ):
            assert http.request(method, path).status_code == 401
