"""Every error is OpenAI's envelope and names the field."""

from __future__ import annotations

import json
import threading
import time

import httpx
import openai
import pydantic
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from messages import says
from sgl_jax.server.bodies import Body

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def error(answer: httpx.Response) -> dict:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, HELLO | {"temprature": 1}, "temprature"),
        (CHAT, HELLO | {"temperature": "hot"}, "temperature"),
        (CHAT, HELLO | {"temperature": -1}, "temperature"),
        (CHAT, HELLO | {"top_p": 0}, "top_p"),
        (CHAT, HELLO | {"n": 0}, "n"),
        (CHAT, HELLO | {"n": True}, "n"),
        (CHAT, HELLO | {"max_tokens": 0}, "max_tokens"),
        (CHAT, HELLO | {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (CHAT, HELLO | {"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens"),
        (CHAT, HELLO | {"stop": [""]}, "stop[0]"),
        (CHAT, HELLO | {"logit_bias": {"a": 1}}, "logit_bias.a"),
        (CHAT, HELLO | {"logit_bias": {"512": 1}}, "logit_bias"),
        (CHAT, HELLO | {"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        (CHAT, HELLO | {"stop_token_ids": [512]}, "stop_token_ids"),
        (CHAT, HELLO | {"stop": ["a"] * 65}, "stop"),
        (CHAT, HELLO | {"stop": "a" * 1025}, "stop"),
        (CHAT, HELLO | {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, HELLO | {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, HELLO | {"tool_choice": "any"}, "tool_choice"),
        (CHAT, HELLO | {"functions": [{}]}, "functions"),
        (CHAT, HELLO | {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, HELLO | {"modalities": ["audio"]}, "modalities[0]"),
        (CHAT, HELLO | {"audio": {}}, "audio"),
        (CHAT, HELLO | {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, HELLO | {"chat_template_kwargs": {"messages": []}}, "messages"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [512]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt[0]"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 511}, "min_tokens"),
        ("/generate", {}, "text"),
        ("/generate", {"text": "a", "input_ids": [1]}, "text"),
        ("/generate", {"input_ids": []}, "input_ids"),
        ("/generate", {"input_ids": [700]}, "input_ids"),
        ("/generate", {"text": "a", "sampling_params": {"regex": 1}}, "sampling_params.regex"),
        ("/generate", {"text": "a", "sampling_params": {"min_new_tokens": 511}}, "min_new_tokens"),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ("/generate", {"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ("/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/abort_request", {}, "rid"),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(http: httpx.Client, path: str, body: dict, param: str) -> None:
    answer = http.post(path, json=body)
    found = error(answer)
    assert answer.status_code == 400
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"
    assert param.rpartition(".")[2].partition("[")[0] in found["message"]


def test_unknown_parameter_has_its_code(http: httpx.Client) -> None:
    assert error(http.post(CHAT, json=HELLO | {"frobnicate": 1}))["code"] == "unknown_parameter"
    assert error(http.post(CHAT, json=HELLO | {"verbosity": "low"}))["code"] == "unsupported_parameter"


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type … custom … other kinds"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions … older form"),
        (CHAT, {"modalities": ["audio"]}, "modalities[0] … audio … images"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
            "messages[0].content[1].type … image_url … images",
        ),
        (CHAT, {"verbosity": "low"}, "verbosity … supported"),
        ("/generate", {"text": "a", "image_data": ["a"]}, "image_data … images"),
    ],
)
def test_what_is_not_built_is_said_to_be(http: httpx.Client, path: str, body: dict, message: str) -> None:
    found = error(http.post(path, json=HELLO | body if path == CHAT else body))
    assert says(found["message"], message)
    assert found["code"] == "unsupported_parameter"


def test_a_wrong_choice_is_no_missing_feature(http: httpx.Client) -> None:
    found = error(http.post(CHAT, json={"messages": [{"role": "robot", "content": "a"}]}))
    assert found["code"] == "invalid_value"


@pytest.mark.parametrize("body", [b"{", b'{"messages": [}', b"[]", b"", b"\xff"])
def test_malformed_json(http: httpx.Client, body: bytes) -> None:
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in error(answer)["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400),
        (CHAT, HELLO | {"rid": "\ud800"}, 400),
        (CHAT, HELLO | {"model": "\ud800"}, 404),
        (CHAT, HELLO | {"user": "\ud800"}, 200),
        (CHAT, HELLO | {"cache_salt": "\ud800"}, 400),
        ("/generate", {"text": "a", "extra_key": "\ud800"}, 400),
    ],
)
def test_lone_surrogates_break_nothing(http: httpx.Client, path: str, body: dict, status: int) -> None:
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    if status == 400:
        assert error(answer)["type"] == "invalid_request_error"


def test_arguments_of_a_past_tool_call_may_be_anything(http: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    past = {"role": "assistant", "content": "a", "tool_calls": [call]}
    assert http.post(CHAT, json={"messages": [*HELLO["messages"], past]}).status_code == 200


def test_a_prompt_that_does_not_fit_is_told_the_three_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="stories", prompt=[5] * 500, max_tokens=50)
    assert raised.value.code == "context_length_exceeded"
    assert all(number in str(raised.value) for number in ("500", "50", "512"))
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="stories", prompt=[5] * 512, max_tokens=1)
    assert raised.value.code == "context_length_exceeded"


def test_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="gpt-9", prompt="a"),
        lambda: client.chat.completions.create(model="gpt-9", messages=HELLO["messages"]),
        lambda: client.models.retrieve("gpt-9"),
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            call()
        assert raised.value.code == "model_not_found"
        assert raised.value.param == "model"


def test_unknown_path_and_wrong_method(http: httpx.Client) -> None:
    assert error(http.get("/v1/nothing"))["code"] == "not_found"
    assert http.get("/v1/nothing").status_code == 404
    wrong = http.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "OPTIONS, POST"
    assert error(wrong)["code"] == "method_not_allowed"


def test_a_path_of_several_routes_allows_the_methods_of_all(http: httpx.Client) -> None:
    for path, allowed in (("/ping", "GET, HEAD, OPTIONS, POST"), ("/v1/responses/x", "DELETE, GET, HEAD, OPTIONS")):
        wrong = http.put(path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)
        assert says(error(wrong)["message"], allowed)


def test_api_key_guards_everything_but_health() -> None:
    with LiveServer(api_key="secret") as server, server.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.head("/health").status_code == 200
        assert http.head("/ready").status_code == 200
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/generate"), ("GET", "/docs")):
            answer = http.request(method, path)
            assert answer.status_code == 401
            assert error(answer)["code"] == "invalid_api_key"
            wrong = http.request(method, path, headers={"Authorization": "Bearer wrong"})
            assert wrong.status_code == 401
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
            assert http.get("/v1/models", headers={"Authorization": f"{scheme} secret"}).status_code == 200
        for value in ("secret", "Basic secret", "Bearer", "Bearersecret", "Bearer SECRET"):
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == 401
        assert server.openai("secret").models.list().data[0].id == "stories"
        with pytest.raises(openai.AuthenticationError):
            server.openai("wrong").models.list()
        assert "secret" not in http.get("/get_server_info", headers={"Authorization": "Bearer secret"}).text


def test_a_full_queue_is_a_429() -> None:
    body = {"text": "a", "sampling_params": {"n": 4, "ignore_eos": True}}
    with LiveServer(lambda: FakeCore(step_seconds=1), max_queued_requests=4) as server, server.http() as http:
        waiting = threading.Thread(target=lambda: http.post("/generate", json=body | {"rid": "waiting"}))
        waiting.start()
        while server.service.num_live < 4:
            time.sleep(0.005)
        answer = http.post("/generate", json={"text": "a"})
        assert answer.status_code == 429
        assert "retry-after" in answer.headers
        assert error(answer)["code"] == "queue_full"
        with server.openai() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="stories", prompt=["a"] * 4)
        http.post("/abort_request", json={"rid": "waiting"})
        waiting.join()


def test_a_request_the_queue_can_never_hold_is_a_400() -> None:
    with LiveServer(max_queued_requests=4) as server, server.http() as http:
        for path, body, param in (
            ("/generate", {"text": "a", "sampling_params": {"n": 5}}, "n"),
            ("/generate", {"text": ["a"] * 5}, "text"),
            ("/v1/completions", {"prompt": ["a"] * 5}, "prompt"),
            (CHAT, HELLO | {"n": 5}, "n"),
        ):
            answer = http.post(path, json=body)
            assert answer.status_code == 400
            assert error(answer)["param"] == param
            assert "4 (--max-queued-requests)" in error(answer)["message"]
        assert http.post("/generate", json={"text": "a", "sampling_params": {"n": 4}}).status_code == 200


def test_before_the_engine_is_ready() -> None:
    with LiveServer(open_service=False) as server, server.http() as http:
        assert http.get("/health").status_code == 200
        for method, path, body in (
            ("GET", "/ready", None),
            ("GET", "/health_generate", None),
            ("GET", "/v1/models", None),
            ("GET", "/get_server_info", None),
            ("POST", "/flush_cache", None),
            ("POST", "/generate", {"text": "a"}),
            ("POST", "/tokenize", {"prompt": "a"}),
            ("POST", CHAT, HELLO),
            ("POST", "/v1/completions", {"prompt": "a"}),
        ):
            answer = http.request(method, path, json=body)
            assert answer.status_code == 503, path
            assert error(answer)["code"] == "not_ready"
        assert http.get("/metrics").status_code == 200
        assert http.get("/version").status_code == 200


class _Breaks(FakeCore):
    def step(self):
        if self._totals["steps"] >= 3:
            raise RuntimeError("the device is lost")
        return super().step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_clients_get_errors() -> None:
    body = {"text": "a", "sampling_params": {"ignore_eos": True}}
    with LiveServer(lambda: _Breaks(step_seconds=0.01)) as server, server.http() as http:
        stream = http.post("/generate", json=body | {"stream": True})
        assert "the device is lost" in stream.text
        assert "[DONE]" not in stream.text
        after = http.post("/generate", json=body)
        assert after.status_code == 500
        assert error(after)["code"] == "engine_failed"
        assert http.get("/health").status_code == 500
        assert http.get("/ready").status_code == 500
    with LiveServer(lambda: _Breaks(step_seconds=0.01)) as server, server.openai() as client:
        with pytest.raises(openai.InternalServerError, match="the device is lost"):
            client.completions.create(model="stories", prompt="a", extra_body={"ignore_eos": True})
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="stories", prompt="a", stream=True))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, HELLO | {"max_completion_tokens": 600}, "max_completion_tokens … 600"),
        (CHAT, HELLO | {"max_tokens": 600}, " max_tokens … 600"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 600}}, "max_new_tokens … 600"),
        ("/generate", {"text": "a", "sampling_params": {"max_tokens": 600}}, " max_tokens … 600"),
        (
            "/generate",
            {"text": "a", "sampling_params": {"min_tokens": 4, "max_new_tokens": 3}},
            "min_tokens … 4 … max_new_tokens … 3",
        ),
        (
            CHAT,
            HELLO | {"temperature": 1e5},
            "temperature … 10000 … 100000.0",
        ),
    ],
)
def test_a_parameter_has_the_name_that_the_user_wrote(http: httpx.Client, path: str, body: dict, message: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert says(error(answer)["message"], message)


def test_a_request_id_is_not_taken_for_a_parameter() -> None:
    body = HELLO | {"rid": "max_tokens 1", "max_completion_tokens": 400, "ignore_eos": True}
    with LiveServer(lambda: FakeCore(step_seconds=1)) as server, server.http() as http:
        waiting = threading.Thread(target=lambda: http.post(CHAT, json=body))
        waiting.start()
        while server.service.num_live < 1:
            time.sleep(0.005)
        found = error(http.post(CHAT, json=body))
        http.post("/abort_request", json={"rid": "max_tokens 1"})
        waiting.join()
    assert says(found["message"], "request id max_tokens 1 ")


def bodies() -> list[type[Body]]:
    found, new = set(), [Body]
    while new:
        new = [each for parent in new for each in parent.__subclasses__()]
        found.update(new)
    return sorted(found, key=lambda each: (each.__module__, each.__name__))


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body.__name__)
def test_of_many_wrong_values_few_are_described(body: type[Body]) -> None:
    """A body of a few megabytes would otherwise cost gigabytes and minutes, just to be refused."""
    wrong = object()
    for value in ({name: [wrong] * 3000 for name in [*body.model_fields, "a"]}, {f"a{i}": 1 for i in range(3000)}):
        with pytest.raises(pydantic.ValidationError) as raised:
            body.model_validate(value)
        assert raised.value.error_count() < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a"} | {f"a{i}": 1 for i in range(2048)}, "the body … 2049 … 2048"),
        ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(2049)}}, "logit_bias … 2049 … 2048"),
        ({"prompt": "a", "metadata": {str(i): 1 for i in range(2049)}}, "metadata … 2049 … 2048"),
        ({"prompt": [{}] * 100_000}, "prompt[0] … an object"),
        ({"prompt": [1, "a" * 100]}, "prompt[0] … it is 1"),
    ],
    ids=range(5),
)
def test_a_body_of_too_many_fields_is_told_the_limit(http: httpx.Client, body: dict, message: str) -> None:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert says(error(answer)["message"], message)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("hot", '"hot"'),
        (True, "true"),
        ([1, 2], "a list of 2"),
        ({}, "an object"),
        ("\n" * 60, f'"{chr(92)}n'),
        ("a" * 100, f'"{"a" * 79}… (102 characters)'),
        ("\ud800", "?"),
        (10001, "10001"),
    ],
)
def test_a_wrong_value_is_shown(http: httpx.Client, value: object, shown: str) -> None:
    body = json.dumps({"prompt": "a", "temperature": value})
    found = error(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}))
    assert found["param"] == "temperature"
    assert f"; it is {shown}" in found["message"] or shown == "?"
    assert len(found["message"]) < 300
