"""Engine.chat on small models, from the request to the parsed answer: whatever the weights would rather say, calls and content
have the form that was asked for, behind thoughts that end in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sgl_jax
from sgl_jax.request import InvalidParameter

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_running_requests": 8,
    "max_total_tokens": 8192,
    "chunked_prefill_size": 64,
}
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is true %}<think>\n{% elif enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% if tools and messages is none %}<tool_call>{% endif %}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Paris"]}, "day": {"enum": [1, 2]}},
    "required": ["city", "day"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Hello"}]


def tool(name: str, schema: dict[str, Any] = CITY) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}


TOOLS = [tool("weather"), tool("news")]
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}}
NAMED = {"type": "function", "function": {"name": "news"}}


def some_tools(mode: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}


def fits(text: str) -> bool:
    found = json.loads(text)
    return list(found) == ["city", "day"] and found["city"] in ("Oslo", "Paris") and found["day"] in (1, 2)


def names(choice: dict[str, Any]) -> list[str]:
    """Return the functions that a choice calls, each with arguments that fit."""
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert all(fits(call["arguments"]) for call in calls)
    return [call["name"] for call in calls]


@pytest.fixture(scope="module")
def thinker(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sgl_jax.Engine]:
    """Load random weights with the markers of Qwen's formats as tokens."""
    folder = tmp_path_factory.mktemp("thinker")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((stories260k / name).read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"] += [{"id": 512 + i, "content": text, **plain} for i, text in enumerate(MARKERS)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 512 + len(MARKERS)}
    (folder / "config.json").write_text(json.dumps(config))
    with sgl_jax.Engine(str(folder), load_format="dummy", chat_template=TEMPLATE, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def teller(stories260k: Path) -> Iterator[sgl_jax.Engine]:
    """Load a model without markers and without a format of its own."""
    with sgl_jax.Engine(
        str(stories260k), chat_template="{{ messages[-1].content }}{% if tools %}{% endif %}", **OPTIONS
    ) as engine:
        yield engine


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", {"weather", "news"}),
        (NAMED, {"news"}),
        (some_tools("required"), {"news"}),
    ],
)
@pytest.mark.parametrize("model", ["thinker", "teller"])
def test_a_call_is_forced(request: pytest.FixtureRequest, model: str, choice: Any, expected: set[str]) -> None:
    engine = request.getfixturevalue(model)
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "n": 8, "seed": 1}
    fields |= {"thinking_token_budget": 8} if model == "thinker" else {}
    choices = engine.chat(HELLO, **fields)["choices"]
    assert [each["finish_reason"] for each in choices] == ["tool_calls"] * 8
    assert [each["message"]["content"] for each in choices] == [None] * 8
    found = [names(each) for each in choices]
    assert {len(each) for each in found} == {1}
    assert {each[0] for each in found} == expected


@pytest.mark.parametrize(("enable_thinking", "budget"), [(True, 5), (None, 5), (True, 0), (False, 5)])
def test_json_is_behind_a_thought_of_bounded_length(
    thinker: sgl_jax.Engine, enable_thinking: bool | None, budget: int
) -> None:
    switch = {} if enable_thinking is None else {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    fields = {**FORM, **switch, "n": 4, "seed": 2, "thinking_token_budget": budget, "logprobs": True}
    for choice in thinker.chat(HELLO, **fields)["choices"]:
        assert choice["finish_reason"] == "stop"
        assert fits(choice["message"]["content"])
        tokens = [each["token"] for each in choice["logprobs"]["content"]]
        if enable_thinking:
            assert tokens.index("</think>") == budget  # random weights end no thought before
        elif enable_thinking is None and "<think>" in tokens:
            assert tokens.index("</think>") - tokens.index("<think>") == budget + 1
        else:
            assert "</think>" not in tokens
        assert ("reasoning_content" in choice["message"]) == ("</think>" in tokens and budget > 0)


@pytest.mark.parametrize("model", ["thinker", "teller"])
def test_calls_or_content_of_a_form(request: pytest.FixtureRequest, model: str) -> None:
    engine = request.getfixturevalue(model)
    fields = {"reasoning_effort": "none"} if model == "thinker" else {}
    choices = engine.chat(HELLO, tools=TOOLS, **FORM, parallel_tool_calls=False, n=16, seed=4, temperature=5, **fields)[
        "choices"
    ]
    assert {each["finish_reason"] for each in choices} == {"stop", "tool_calls"}
    for each in choices:
        assert fits(each["message"]["content"]) if each["finish_reason"] == "stop" else names(each)


def test_only_allowed_functions_among_free_text(thinker: sgl_jax.Engine) -> None:
    bias = {"512": 8, "2": 8}  # for <tool_call>, and the end
    fields = {"logit_bias": bias, "n": 16, "seed": 5, "max_tokens": 200, "reasoning_effort": "none"}
    choices = thinker.chat(HELLO, tools=TOOLS, tool_choice=some_tools("auto"), **fields)["choices"]
    whole = [each for each in choices if each["finish_reason"] == "tool_calls"]
    assert whole
    assert {name for each in whole for name in names(each)} == {"news"}


def test_a_stream_and_asyncio_give_the_same(thinker: sgl_jax.Engine) -> None:
    fields = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 6,
        "reasoning_effort": "none",
    }
    [whole] = thinker.chat(HELLO, **fields)["choices"]

    async def streamed() -> list[dict[str, Any]]:
        return [chunk async for chunk in await thinker.async_chat(HELLO, stream=True, **fields)]

    async def answered() -> dict[str, Any]:
        return await thinker.async_chat(HELLO, **fields)

    call = whole["message"]["tool_calls"][0]["function"]
    assert asyncio.run(answered())["choices"][0]["message"]["tool_calls"][0]["function"] == call
    for chunks in (list(thinker.chat(HELLO, stream=True, **fields)), asyncio.run(streamed())):
        pieces = [each["function"] for chunk in chunks for each in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert pieces[0]["name"] == call["name"]
        assert "".join(piece["arguments"] for piece in pieces) == call["arguments"]
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_token": 3}, "max_token"),
        ({"model": "unheard-of"}, "model"),
        ({"tools": [tool("f", {"enum": ["\ud800"]})], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [tool("f", {"not": {}})], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
    ],
)
def test_what_a_chat_refuses_names_the_field(teller: sgl_jax.Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        teller.chat(HELLO, **fields)
    assert refused.value.param.startswith(param)
