"""Anthropic's Messages API. The template makes the last message the whole prompt, which the fake engine repeats as its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from messages import says
from sgl_jax.server.anthropic_request import arguments_of

TEMPLATE = str(Path(__file__).parent / "tool_template.jinja")
TOOLS = [{"name": name, "input_schema": {"type": "object", "properties": {"a": {}}}} for name in ("first", "second")]
CALL = '<tool_call>\n{"name": "first", "arguments": {"a": [1, "é"]}}\n</tool_call>'
ANSWER = f'<think>\nHm é.\n</think>\n\nLet me see.\n{CALL}\n<tool_call>\n{{"name": "second", "arguments": {{}}}}\n</tool_call>'


@pytest.fixture(scope="module")
def live(repeating: LiveServer) -> LiveServer:
    return repeating


def body(answer: str = "Hi there.", **more: Any) -> dict[str, Any]:
    return {"model": "stories", "max_tokens": 300, "messages": [{"role": "user", "content": answer}]} | more


def events(http: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    with http.stream("POST", "/v1/messages", json=body(**more, stream=True)) as response:
        assert response.status_code == 200
        blocks = "".join(response.iter_text()).split("\n\n")
    found = []
    for block in filter(None, blocks):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def message_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the message that a stream's events add up to, and check their order."""
    start, *middle, delta, stop = found
    assert (start["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], None, 0)
    is_open = False
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"] | {"json": ""})
                is_open = True
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(message["content"]) - 1
                block, change = message["content"][-1], event["delta"]
                match change["type"]:
                    case "text_delta":
                        block["text"] += change["text"]
                    case "thinking_delta":
                        block["thinking"] += change["thinking"]
                    case "signature_delta":
                        block["signature"] += change["signature"]
                    case "input_json_delta":
                        block["json"] += change["partial_json"]
            case "content_block_stop":
                assert is_open
                is_open = False
    assert not is_open
    for block in message["content"]:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    return message | delta["delta"] | {"usage": message["usage"] | delta["usage"]}


def both(http: httpx.Client, answer: str = "Hi there.", **more: Any) -> dict[str, Any]:
    """Return an answer, which is the same whole and as a stream."""
    response = http.post("/v1/messages", json=body(answer, **more))
    assert response.status_code == 200, response.text
    whole, streamed = response.json(), message_of(events(http, answer=answer, **more))
    for found in (whole, streamed):
        assert found.pop("id").startswith("msg_")
        for block in found["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("call_")
        usage = found["usage"]
        usage["all"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
    assert whole == streamed
    return whole


def test_text_thoughts_and_calls_are_blocks_in_order(http: httpx.Client) -> None:
    found = both(http, ANSWER, tools=TOOLS)
    assert found["content"] == [
        {"type": "thinking", "thinking": "Hm é.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "name": "first", "input": {"a": [1, "é"]}},
        {"type": "tool_use", "name": "second", "input": {}},
    ]
    assert (found["stop_reason"], found["stop_sequence"]) == ("tool_use", None)
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "stories")


def test_reasons_to_stop(http: httpx.Client) -> None:
    assert both(http)["stop_reason"] == "end_turn"
    cut = both(http, "a b c d e f", max_tokens=3)
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 3)
    stopped = both(http, "One. Two. Three.", stop_sequences=["zzz", "Two"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "Two")
    assert stopped["content"][0]["text"].strip() == "One."


def test_a_call_that_is_cut_has_an_input(http: httpx.Client) -> None:
    response = http.post("/v1/messages", json=body(CALL, tools=TOOLS, max_tokens=40)).json()
    assert response["stop_reason"] == "max_tokens"
    assert response["content"][0]["input"] == {}


def test_counted_tokens_are_those_of_the_request(http: httpx.Client) -> None:
    asked = body(
        "A story of é.",
        tools=TOOLS,
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
    )
    usage = http.post("/v1/messages", json=asked).json()["usage"]
    del asked["max_tokens"]
    counted = http.post("/v1/messages/count_tokens", json=asked)
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert usage["cache_creation_input_tokens"] == 0


def test_a_coding_agents_request_is_taken(http: httpx.Client) -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "<reminder>"}, {"type": "text", "text": "Fix it.", **mark}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "x"},
                {"type": "redacted_thinking", "data": "y"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "first", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "ok"}], **mark},
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "system", "content": "A reminder."},
        {"role": "user", "content": "Done?"},
    ]
    more = {
        "messages": turns,
        "system": [{"type": "text", "text": "You are an agent.", **mark}],
        "tools": [tool | mark for tool in TOOLS],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-api-key": "any"}
    response = http.post("/v1/messages?beta=true", json=body() | more, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            "tool_result",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "thinking … user"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens … missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, "thinking.budget_tokens is 300 … max_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 4}}, "disabled … budget_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice … name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "third"}}, "third … first, second"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "a"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"nonsense": 1}, "nonsense"),
        (
            {
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
                "output_format": {"type": "json_schema", "schema": {}},
            },
            "output_format",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, more: dict[str, Any], said: str) -> None:
    response = http.post("/v1/messages", json={k: v for k, v in (body() | more).items() if v is not None})
    answer = response.json()
    assert response.status_code == 400
    assert (answer["type"], answer["error"]["type"]) == ("error", "invalid_request_error")
    assert says(answer["error"]["message"], said), answer


def test_errors_have_the_form_of_the_api(http: httpx.Client) -> None:
    unknown = http.post("/v1/messages", json=body() | {"model": "other"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert unknown.json()["request_id"] == unknown.headers["request-id"] == unknown.headers["x-request-id"]
    taken = http.post("/v1/messages", json=body(), headers={"x-request-id": "mine"})
    assert taken.headers["request-id"] == "mine"
    assert "request-id" not in http.get("/v1/models").headers
    broken = http.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["type"]) == (400, "error")
    with LiveServer(api_key="secret") as guarded, guarded.http() as other:
        other.headers.pop("authorization", None)
        refused = other.post("/v1/messages", json=body())
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        taken = other.post("/v1/messages", json=body(), headers={"x-api-key": "secret"})
        assert taken.status_code == 200
        wrong = other.post("/v1/messages", json=body(), headers={"x-api-key": "secre"})
        assert (wrong.status_code, wrong.json()["request_id"]) == (401, wrong.headers["request-id"])


def test_turns_are_as_templates_take_them(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if not (loop.last and continue_final_message) %}|{% endif %}{% endfor %}{{ tools or '' }}"
    )
    turns = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "system", "content": "c"},
        {"role": "assistant", "content": "{"},
    ]
    with LiveServer(lambda: FakeCore(step_seconds=0.001), chat_template=str(template)) as live, live.http() as other:
        found = other.post("/v1/messages", json=body(system="s") | {"messages": turns}).json()
        assert found["content"][0]["text"].strip() == "system:s|user:a\n\nb\n\nc|assistant:{"
        whole = other.post("/v1/messages", json=body(system="s") | {"messages": turns, "max_tokens": 100_000})
        assert whole.json()["content"] == found["content"]
        long = {"model": "stories", "messages": [{"role": "user", "content": "word " * 2000}]}
        assert other.post("/v1/messages/count_tokens", json=long).json()["input_tokens"] > 2000
        effort = other.post("/v1/messages", json=body() | {"output_config": {"effort": "high"}})
        assert effort.status_code == 200


def test_an_input_is_valid_unicode_and_not_too_deep() -> None:
    assert arguments_of(r'{"a": "\ud83d"}') == {"a": "?"}
    assert arguments_of(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}
    for text in ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": 1', "[1]", ""):
        assert arguments_of(text) == {}


def test_a_thread_is_refused_as_the_library_knows_it(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=body(thread={"type": "create"})).json()
    assert answer["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_an_answers_own_blocks_are_taken_back(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json=body(ANSWER, tools=TOOLS)).json()
    blocks = [block | {"citations": None, "toolset_name": None} for block in answer["content"]]
    results = [
        {"type": "tool_result", "tool_use_id": b["id"], "content": "ok"} for b in blocks if b["type"] == "tool_use"
    ]
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": results},
    ]
    response = http.post("/v1/messages", json=body(tools=TOOLS) | {"messages": turns})
    assert response.status_code == 200, response.text
