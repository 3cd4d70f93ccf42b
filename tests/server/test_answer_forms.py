"""The grammar of a whole answer, as the engine gets it, by tools, tool_choice, response_format and budgets of thoughts. The
engine is a fake that takes any grammar without the word "bad"."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import tokenizers
from live_server import MODEL, LiveServer

from fakes.fake_core import FakeCore, fake_info
from messages import says
from sgl_jax.engine.messages import Generate
from sgl_jax.request import Grammar
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.reasoning_effort import template_kwargs
from sgl_jax.text.chat_template import ChatTemplate
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.text.tool_calls.answer_form import AnswerForm, CallableFunction
from sgl_jax.text.vocabulary import Vocabulary

CHAT = "/v1/chat/completions"
TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
# Shows the tools' names, and opens or closes a thought as Qwen's templates do.
TEMPLATE = (
    "{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}"
    "{% if enable_thinking is true %}<think>{% elif enable_thinking is false %}<think></think>{% endif %}"
    "{% if messages is none %}<tool_call></think>{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY = {"type": "object"}
CLOSED = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


FIRST, SECOND, STRICT = tool("first"), tool("second"), tool("third", strict=True)
NAMED = {"type": "function", "function": {"name": "second"}}
JSON = {"response_format": {"type": "json_object"}}
AS_CONTENT = Grammar("json_schema", '{"type":"object"}')


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


def switched(on: bool) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": on}}


def form(*functions: str | CallableFunction, **more: Any) -> AnswerForm:
    """Return a form with calls of the functions, whose answer may begin with a thought."""
    found = [each if isinstance(each, CallableFunction) else CallableFunction(each, ANY) for each in functions]
    return AnswerForm(**{"thoughts": "think", "calls": "hermes" if found else None, "functions": tuple(found), **more})


class Sender:
    """A client of a server whose vocabulary has markers as tokens, or has not."""

    def __init__(self, live: LiveServer, http: httpx.Client):
        self._live, self._http = live, http

    def __call__(self, **body: Any) -> httpx.Response:
        return self._http.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]} | body)

    def sent(self, **body: Any) -> Generate:
        """Return what the engine gets for a request."""
        self(**body).raise_for_status()
        return [command for command in self._live.core.commands if isinstance(command, Generate)][-1]

    def form(self, **body: Any) -> AnswerForm | None:
        grammar = self.sent(**body).params.grammar
        assert grammar is None or grammar.kind == "answer_form"
        return None if grammar is None else AnswerForm.read(grammar.text)

    def shown(self, **body: Any) -> str:
        return self._live.service.tokenizer.decode(self.sent(**body).prompt_ids).split("a")[0]

    def refused(self, **body: Any) -> tuple[str, str]:
        answer = self(**body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        return error["param"], error["message"]


@pytest.fixture(scope="module")
def marked() -> Iterator[Sender]:
    backend = tokenizers.Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    backend.add_special_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    found = Vocabulary(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    with LiveServer(lambda: FakeCore(fake_info(vocab_size=516)), chat_template=TEMPLATE) as live:
        live.service.tokenizer = Tokenizer(found, TEMPLATE)
        with live.http() as http:
            yield Sender(live, http)


@pytest.fixture(scope="module")
def plain() -> Iterator[Sender]:
    """Serve a model without tokens for markers, which does not think."""
    with LiveServer(FakeCore, chat_template=TEMPLATE.replace("think>", "b>")) as live, live.http() as http:
        yield Sender(live, http)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tools": [FIRST, SECOND]}, None),
        ({"tools": [FIRST, STRICT], "tool_choice": "none"}, None),
        ({"tools": [FIRST, SECOND], "tool_choice": "required"}, form("first", "second", must_call=True)),
        ({"tools": [FIRST, SECOND], "tool_choice": NAMED}, form("second", must_call=True)),
        ({"tools": [FIRST, SECOND], **allowed("required", "first")}, form("first", must_call=True)),
        ({"tools": [FIRST, SECOND], **allowed("auto", "first")}, form("first")),
        ({"tools": [FIRST], "tool_choice": "required", **JSON}, form("first", must_call=True)),
        (
            {"tools": [FIRST], "tool_choice": "required", "parallel_tool_calls": False},
            form("first", must_call=True, one_call=True),
        ),
        ({"tools": [FIRST, STRICT]}, form("first", CallableFunction("third", SCHEMA))),
        ({"tools": [tool("f", strict=True, parameters=None)]}, form(CallableFunction("f", CLOSED))),
        (
            {"tools": [FIRST, STRICT], **allowed("auto", "first", "third")},
            form("first", CallableFunction("third", SCHEMA)),
        ),
        ({"tools": [FIRST], **JSON}, form("first", content=AS_CONTENT)),
        (JSON, form(content=AS_CONTENT)),
        ({"regex": "a+", **switched(True)}, form(content=Grammar("regex", "a+"), thought="open")),
        ({"thinking_token_budget": 0}, form(max_thought_tokens=0)),
        (
            {"thinking_token_budget": 7, "tools": [FIRST], **JSON},
            form("first", content=AS_CONTENT, max_thought_tokens=7),
        ),
        ({"thinking_token_budget": 7, "tools": [FIRST]}, form(max_thought_tokens=7)),
        ({"thinking_token_budget": 7, **switched(False)}, None),
        (
            {"thinking_token_budget": 7, "tools": [FIRST], "tool_choice": "required", **switched(False)},
            form("first", must_call=True, thoughts=None, thought="closed"),
        ),
    ],
)
def test_the_form_of_an_answer(marked: Sender, body: dict[str, Any], expected: AnswerForm | None) -> None:
    assert marked.form(**body) == expected


def test_content_alone_stays_a_grammar_of_its_own(marked: Sender, plain: Sender) -> None:
    assert marked.sent(**JSON, **switched(False)).params.grammar == AS_CONTENT
    assert plain.sent(**JSON).params.grammar == AS_CONTENT


def test_the_model_sees_all_tools_where_a_grammar_keeps_it_from_others(marked: Sender, plain: Sender) -> None:
    tools = {"tools": [FIRST, SECOND]}
    for body in (allowed("auto", "second"), allowed("required", "second"), {"tool_choice": NAMED}, {}):
        assert marked.shown(**tools, **body).split() == ["first", "second"]
    assert plain.shown(**tools, **allowed("auto", "second")).split() == ["second"]
    assert plain.form(**tools, **allowed("auto", "second")) is None
    assert plain.shown(**tools, **allowed("required", "second")).split() == ["first", "second"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tool_choice … tools"),
        ({"tool_choice": NAMED}, "tool_choice", "tool_choice … tools"),
        ({"tools": [FIRST], "tool_choice": NAMED}, "tool_choice", "tool_choice … second … first"),
        ({"tools": [FIRST], **allowed("auto", "first", "x")}, "tool_choice", "tool_choice … x … first"),
        ({"tools": [FIRST], **allowed("any", "first")}, "tool_choice.allowed_tools.mode", "auto"),
        ({"tools": [FIRST], "tool_choice": {"type": "custom"}}, "tool_choice", "custom … allowed_tools"),
        ({"tools": [FIRST, tool("b", strict=True, parameters={"a": "bad"})]}, "tools[1].function.parameters", "bad"),
        ({"tools": [FIRST, tool("bad")], "tool_choice": "required"}, "tool_choice", "bad"),
        ({"tools": [FIRST], "regex": "bad"}, "regex", "regex … bad"),
        (
            {"tools": [tool("b", strict=True, parameters={"type": "array"})]},
            "tools[0].function.parameters",
            "array … object",
        ),
        ({"tools": [STRICT], "ignore_eos": True}, "ignore_eos", "ignore_eos … tools[0].function.parameters … eos"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "0"),
        ({"thinking_token_budget": 1, "ignore_eos": True}, "ignore_eos", "thinking_token_budget … eos"),
        ({"reasoning_effort": "max"}, "reasoning_effort", "xhigh"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    marked: Sender, body: dict[str, Any], param: str, message: str
) -> None:
    found, said = marked.refused(**body)
    assert found == param
    assert says(said, message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [FIRST, STRICT]}, "tools[1].function.strict", "hermes … tool_choice … required … strict … false"),
        ({"thinking_token_budget": 7}, "thinking_token_budget", "thoughts … --reasoning-parser"),
    ],
)
def test_a_model_without_markers_is_told(plain: Sender, body: dict[str, Any], param: str, message: str) -> None:
    found, said = plain.refused(**body)
    assert found == param
    assert says(said, message)


def test_a_server_that_looks_for_no_calls_forces_none() -> None:
    with LiveServer(FakeCore, chat_template=TEMPLATE, tool_call_parser="none") as live, live.http() as http:
        ask = Sender(live, http)
        assert ask.refused(tools=[FIRST], tool_choice="required")[0] == "tool_choice"
        assert ask.refused(tools=[STRICT])[0] == "tools[0].function.strict"


def test_a_launch_without_grammars_names_the_field() -> None:
    info = msgspec.structs.replace(fake_info(), takes_grammars=False)
    with LiveServer(lambda: FakeCore(info), chat_template=TEMPLATE) as live, live.http() as http:
        found, said = Sender(live, http).refused(tools=[FIRST], tool_choice="required")
    assert found == "tool_choice"
    assert says(said, "tool_choice … --grammar-backend")


def test_thoughts_that_are_not_split_off_come_before_the_grammar_too() -> None:
    with LiveServer(FakeCore, chat_template=TEMPLATE, reasoning_parser="none") as live, live.http() as http:
        assert Sender(live, http).form(**JSON) == form(content=AS_CONTENT)


@pytest.mark.parametrize(
    ("template", "effort", "kwargs", "expected"),
    [
        ("Qwen-Qwen3-0.6B", "none", None, {"enable_thinking": False}),
        ("Qwen-Qwen3-0.6B", "low", {"a": 1}, {"enable_thinking": True, "a": 1}),
        ("Qwen-Qwen3-0.6B", "high", {"enable_thinking": False}, {"enable_thinking": False}),
        ("Qwen-Qwen3-0.6B", None, {"a": 1}, {"a": 1}),
        ("openai-gpt-oss-120b", "low", None, {"reasoning_effort": "low"}),
        ("openai-gpt-oss-120b", "none", None, {"reasoning_effort": "low"}),
        ("openai-gpt-oss-120b", "xhigh", None, {"reasoning_effort": "high"}),
        ("deepseek-ai-DeepSeek-V3.1", "none", None, {"enable_thinking": False, "thinking": False}),
    ],
)
def test_effort_becomes_the_variables_that_a_template_reads(
    template: str, effort: str | None, kwargs: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    source = ChatTemplate((TEMPLATES / f"{template}.jinja").read_text())
    fields = {"messages": [{"role": "user"}], "reasoning_effort": effort, "chat_template_kwargs": kwargs}
    assert template_kwargs(ChatCompletionRequest.model_validate(fields), source) == expected


def test_effort_reaches_the_prompt_and_the_form(marked: Sender) -> None:
    assert marked.form(reasoning_effort="minimal", **JSON) == form(content=AS_CONTENT, thought="open")
    assert marked.sent(reasoning_effort="none", **JSON).params.grammar == AS_CONTENT


def test_effort_is_refused_where_the_template_has_no_switch(live: LiveServer, http: httpx.Client) -> None:
    found, said = Sender(live, http).refused(reasoning_effort="low")
    assert found == "reasoning_effort"
    assert says(said, "low … enable_thinking, thinking, reasoning_effort")
