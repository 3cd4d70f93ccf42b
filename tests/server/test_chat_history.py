"""Conversations with tools as published templates take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_jax.server.chat_history import template_messages, template_tools, with_tools_as_text
from sgl_jax.server.openai_types import FunctionTool, Message
from sgl_jax.text.chat_template import Arguments, ChatTemplate
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, THOUGHTS, calls_in, takes_tools, thoughts_in

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"

CALLED = [{"id": f"call_{name}", "function": {"name": name, "arguments": '{"a": 1}'}} for name in ("first", "second")]
MESSAGES = [
    Message(role="user", content="Hi"),
    Message.model_validate({"role": "assistant", "content": "Wait.", "reasoning": "Hm.", "tool_calls": CALLED}),
    *(Message(role="tool", content=f"RESULT-{name}", tool_call_id=f"call_{name}") for name in ("first", "second")),
]
TOOLS = [
    FunctionTool.model_validate({"type": "function", "function": {"name": name, "description": f"does {name}"}})
    for name in ("first", "second")
]


def rendered(template: str) -> str:
    source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    messages, tools = template_messages(MESSAGES, source), template_tools(TOOLS)
    if not takes_tools(source):
        messages, tools = with_tools_as_text(messages, tools, source), []
    for call in [call for message in messages for call in message.get("tool_calls", ())]:
        call["function"]["arguments"] = Arguments(call["function"]["arguments"])
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, tools=tools or None)


def between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0]


@pytest.mark.parametrize(
    "template",
    [
        "GLM-4.6",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
        "Qwen-Qwen2.5-7B-Instruct",
        "Qwen-Qwen3-0.6B",
        "Qwen3-Coder",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "deepseek-ai-DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-V3.2",
        "google-gemma-2-2b-it",
        "google-gemma-4-31B-it",
        "inclusionai-ling-3.0-flash",
        "meta-llama-Llama-3.1-8B-Instruct",
        "mistralai-Ministral-3-14B-Reasoning-2512",
        "mistralai-Mistral-Nemo-Instruct-2407",
        "moonshotai-Kimi-K2",
        "openai-gpt-oss-120b",
    ],
)
def test_tools_calls_and_results_reach_the_model(template: str) -> None:
    text = rendered(template)
    for word in ("does first", "does second", "RESULT-first", "RESULT-second"):
        assert text.count(word) == 1, word


def test_llama_gets_one_call_a_message_with_its_result_behind_it() -> None:
    text = rendered("meta-llama-Llama-3.1-8B-Instruct").split("<|eot_id|>")[-6:-1]
    assert [turn.split("<|end_header_id|>\n\n")[1] for turn in text[1:]] == [
        '{"name": "first", "parameters": {"a": 1}}',
        '"RESULT-first"',
        '{"name": "second", "parameters": {"a": 1}}',
        '"RESULT-second"',
    ]


def test_ids_have_the_form_that_the_model_knows() -> None:
    kimi = rendered("moonshotai-Kimi-K2")
    assert "<|tool_call_begin|>functions.first:0<|tool_call_argument_begin|>" in kimi
    assert "Return of functions.second:1" in kimi
    mistral = rendered("mistralai-Mistral-Nemo-Instruct-2407")
    assert '"id": "000000001"' in mistral
    assert '"call_id": "000000001"' in mistral


def turn(ids: list[str | None], results: list[str]) -> list[Message]:
    calls = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ids]
    tools = [Message(role="tool", content=text, tool_call_id=i) for i, text in zip(ids, results, strict=True)]
    return [
        Message.model_validate({"role": "assistant", "tool_calls": calls}),
        *tools,
        Message(role="user", content="?"),
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [*turn([None, None], ["r0", "r1"]), *turn([None], ["r2"])],
        [*turn(["0", "1"], ["r0", "r1"]), *turn(["0"], ["r2"])],
        [*turn(["0", "0"], ["r0", "r1"]), *turn(["0"], ["r2"])],
    ],
    ids=["without ids", "used again in a later turn", "the same in one turn"],
)
def test_each_result_belongs_to_its_own_call(messages: list[Message]) -> None:
    apart = template_messages(messages, "single tool-call")
    assert [entry["content"] for entry in apart] == ["", "r0", "", "r1", "?", "", "r2", "?"]
    named = template_messages(messages, "<|tool_call_begin|>")
    assert [entry.get("tool_call_id") for entry in named if entry["role"] == "tool"] == [
        "functions.f:0",
        "functions.f:1",
        "functions.f:2",
    ]


def test_results_are_matched_by_id_before_order() -> None:
    call, first, second, user = turn(["a", "b"], ["ra", "rb"])
    apart = template_messages([call, second, first, user], "single tool-call")
    assert [entry["content"] for entry in apart] == ["", "ra", "", "rb", "?"]


def test_gpt_oss_gets_the_text_before_a_call_as_a_thought() -> None:
    text = rendered("openai-gpt-oss-120b")
    assert between(text, "<|channel|>analysis<|message|>", "<|end|>") == "Hm.\nWait."


def test_a_template_without_tools_has_them_as_text() -> None:
    turns = rendered("google-gemma-2-2b-it").split("<start_of_turn>")[1:]
    assert turns[0].startswith("user\nYou can call these functions:\n")
    assert turns[0].endswith("\n\nHi<end_of_turn>\n")
    assert turns[1] == (
        'model\nWait.\n{"name": "first", "parameters": {"a": 1}}\n{"name": "second", "parameters": {"a": 1}}<end_of_turn>\n'
    )
    assert turns[2] == "user\nResult: RESULT-first\n\nResult: RESULT-second<end_of_turn>\n"


def test_deepseek_is_told_of_its_own_format() -> None:
    older, newer = rendered("deepseek-ai-DeepSeek-R1-Distill-Llama-8B"), rendered("deepseek-ai-DeepSeek-V3.1")
    assert "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>" in older
    assert "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>" in newer
    assert '<｜tool▁call▁begin｜>second<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>' in newer


@pytest.mark.parametrize(
    ("template", "calls", "thoughts"),
    [
        ("GLM-4.6", "glm45", "think"),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "hermes", None),
        ("Qwen-Qwen2.5-7B-Instruct", "hermes", None),
        ("Qwen-Qwen3-0.6B", "hermes", "think"),
        ("Qwen3-Coder", "qwen3_coder", None),
        ("Qwen3.5-4B", "qwen3_coder", "think"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek_v3", "think"),
        ("deepseek-ai-DeepSeek-V3.1", "deepseek_v3", "think"),
        ("deepseek-ai-DeepSeek-V3.2", "deepseek_v32", "think"),
        ("google-gemma-2-2b-it", "llama3", None),
        ("google-gemma-4-31B-it", "gemma4", "gemma4"),
        ("inclusionai-ling-3.0-flash", "glm45", "think"),
        ("llama-cpp-deepseek-r1", "deepseek_v3", "think"),
        ("meta-llama-Llama-3.3-70B-Instruct", "llama3", None),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral", "mistral"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral", None),
        ("moonshotai-Kimi-K2", "kimi_k2", None),
        ("Kimi-K2-Thinking", "kimi_k2", "think"),
        ("openai-gpt-oss-120b", "gpt_oss", "gpt_oss"),
    ],
)
def test_formats_are_known_by_their_template(template: str, calls: str, thoughts: str | None) -> None:
    source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    assert (calls_in(source), thoughts_in(source)) == (calls, thoughts)
    assert calls in {HARMONY, *CALLS}
    assert thoughts in {HARMONY, None, *THOUGHTS}
