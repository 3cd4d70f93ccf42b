"""Tests of reading answers: thoughts, text and calls of every format, which must not depend on how the text was cut."""

import itertools
import json
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sgl_jax.settings.answer_parsers import CALL_PARSERS, THOUGHT_PARSERS
from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, THOUGHTS
from sgl_jax.text.tool_calls.scanner import AnswerFormat, AnswerScanner, thought_state
from sgl_jax.text.tool_calls.schemas import as_json, types_of

CASES = Path(__file__).parents[1] / "data" / "tool_cases"
TOOLS = {
    each["function"]["name"]: each["function"]["parameters"] for each in json.loads((CASES / "tools.json").read_text())
}

# By file of cases: the formats of calls and of thoughts.
FORMATS = {
    "deepseek_v3": ("deepseek_v3", "think"),
    "deepseek_v31": ("deepseek_v3", "think"),
    "deepseek_v32": ("deepseek_v32", "think"),
    "gemma4": ("gemma4", "gemma4"),
    "glm45": ("glm45", "think"),
    "gpt_oss": ("gpt_oss", "gpt_oss"),
    "hermes": ("hermes", None),
    "kimi_k2": ("kimi_k2", "think"),
    "ling3": ("glm45", "think"),
    "llama3_json": ("llama3", None),
    "mistral": ("mistral", "mistral"),
    "pythonic": ("pythonic", None),
    "qwen25": ("hermes", None),
    "qwen3": ("hermes", "think"),
    "qwen3_coder": ("qwen3_coder", "think"),
}


def cases() -> Iterable[Any]:
    for name in FORMATS:
        file = json.loads((CASES / f"{name}.json").read_text())
        for case in file["cases"]:
            yield pytest.param(name, file["atomic"], case, id=f"{name}-{case['name']}")


def answer_format(name: str, case: dict[str, Any]) -> AnswerFormat:
    calls, thoughts = FORMATS[name]
    tools = {} if case.get("tools") == [] else TOOLS
    return AnswerFormat(
        calls if tools else None, thoughts, thought_state(f"<question>{case['prompt_tail']}", thoughts), tools
    )


def at(offsets: Iterable[int], text: str, atomic: list[str]) -> list[str]:
    """Cut the text at the offsets, except inside tokens."""
    inside = {i for each in atomic for match in re.finditer(re.escape(each), text) for i in range(*match.span())}
    starts = {match.start() for each in atomic for match in re.finditer(re.escape(each), text)}
    cuts = sorted({0, len(text), *(i for i in offsets if 0 < i < len(text) and (i not in inside or i in starts))})
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def read(form: AnswerFormat, pieces: Iterable[str]) -> list[Part]:
    """Return the parts of an answer, neighbours of a kind joined."""
    scanner, found = AnswerScanner(form), []
    for part in [part for piece in pieces for part in scanner.push(piece)] + scanner.finish():
        joins = found and isinstance(part, Text | Thought | Arguments) and isinstance(part, type(found[-1]))
        if joins:
            found[-1] = type(part)(found[-1].text + part.text)
        else:
            found.append(part)
    return found


def message(parts: list[Part], stopped_by: str) -> dict[str, Any]:
    """Return the parts as the cases write a message."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Call(name, id):
                calls.append({"name": name, "id": id, "arguments": ""})
            case Arguments(text):
                calls[-1]["arguments"] += text
    finish = "length" if stopped_by == "length" else "tool_calls" if calls else "stop"
    reasoning = "".join(part.text for part in parts if isinstance(part, Thought))
    content = "".join(part.text for part in parts if isinstance(part, Text))
    return {"content": content, "reasoning": reasoning, "tool_calls": calls, "finish_reason": finish}


def same_text(found: str, parts: list[str]) -> bool:
    return found.split() == " ".join(parts).split()


def same_call(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    if found["name"] != wanted["name"] or wanted.get("id") not in (None, found["id"]):
        return False
    if "arguments_text" in wanted:
        return same_text(found["arguments"], [wanted["arguments_text"]])
    try:
        return json.dumps(json.loads(found["arguments"]), sort_keys=True) == json.dumps(
            wanted["arguments"], sort_keys=True
        )
    except ValueError:
        return False


def matches(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    calls = list(zip(found["tool_calls"], wanted["tool_calls"], strict=False))
    return (
        len(found["tool_calls"]) == len(wanted["tool_calls"])
        and all(same_call(*each) for each in calls)
        and same_text(found["content"], wanted["content_parts"])
        and same_text(found["reasoning"], [wanted.get("reasoning", found["reasoning"])])
        and found["finish_reason"] == wanted["finish_reason"]
    )


@pytest.mark.parametrize(("name", "atomic", "case"), list(cases()))
def test_stored_cases_match_however_the_answer_is_cut(name: str, atomic: list[str], case: dict[str, Any]) -> None:
    form, text = answer_format(name, case), case["output"]
    whole = read(form, [text])
    found = message(whole, case.get("stopped_by", ""))
    assert any(matches(found, wanted) for wanted in case["expect"]), found
    random_cuts = random.Random(case["name"])
    for pieces in (
        at(range(len(text)), text, atomic),
        list(text),
        at(case.get("cuts", ()), text, atomic),
        *(at(random_cuts.sample(range(len(text)), min(len(text), 4)), text, []) for _ in range(8)),
    ):
        assert read(form, pieces) == whole


WEATHER = ("get_weather", '{"city": "x"}')
TIME = ("get_time", "{}")


@pytest.mark.parametrize(
    ("name", "output", "content", "calls"),
    [
        # calls that are none
        ("hermes", "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
        ("hermes", '<tool_call>{"name": "get_wea', '<tool_call>{"name": "get_wea', []),
        ("hermes", "<tool_ca", "<tool_ca", []),
        ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
        ("llama3_json", '{"name": "Bob", "parameters": "tall"}', '{"name": "Bob", "parameters": "tall"}', []),
        ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama3_json", '<|python_tag|>search.call(q="x")', '<|python_tag|>search.call(q="x")', []),
        ("qwen3_coder", "Use <function=name> so: <parameter=x>.", "Use <function=name> so: <parameter=x>.", []),
        ("glm45", "Use <tool_call> to call it.", "Use <tool_call> to call it.", []),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> hm", "<｜tool▁calls▁begin｜> hm", []),
        ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ("gemma4", "<|tool_call>hello", "<|tool_call>hello", []),
        ("pythonic", "[get_weather(city=os.getcwd())]", "[get_weather(city=os.getcwd())]", []),
        ("pythonic", 'See [get_weather(city="x")] here', 'See [get_weather(city="x")] here', []),
        # a marker that opens nothing, before a call
        ("hermes", '<tool_call><tool_call>{"name": "get_time", "arguments": {}}</tool_call>', "<tool_call>", [TIME]),
        # forms that models slip into
        ("hermes", '<tool_call>[{"name": "get_time"}, {"name": "get_time"}]</tool_call>', "", [TIME, TIME]),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": null}</tool_call>', "", [TIME]),
        (
            "hermes",
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>',
            "",
            [WEATHER],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1\n2"}}</tool_call>', "", [("f", '{"a": "1\\n2"}')]),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "x"}\n</tool_call> ok', " ok", [WEATHER]),
        ("llama3_json", '[{"name": "get_time", "parameters": {}}]', "", [TIME]),
        ("llama3_json", '{"name": "get_time", "parameters": {}}<|eom_id|>', "", [TIME]),
        ("pythonic", '<|python_start|>{"name": "get_time", "parameters": {}}<|python_end|>', "", [TIME]),
        ("pythonic", '{"answer": 42}', '{"answer": 42}', []),
        ("mistral", '[TOOL_CALLS]get_weather{"city": "x"}', "", [WEATHER]),
        ("qwen3_coder", '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>', "", [TIME]),
        (
            "kimi_k2",
            "<|tool_call_begin|>functions_get_time_1<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "",
            [TIME],
        ),
        ("gpt_oss", "<|channel|>commentary to=functions.get_time<|message|><|call|>", "", [TIME]),
        # markers inside values
        (
            "qwen3_coder",
            "<function=f>\n<parameter=a>\n</tool_call> and </parameter> too\n</parameter>\n</function>",
            "",
            [("f", '{"a": "</tool_call> and </parameter> too"}')],
        ),
        (
            "gemma4",
            '<|tool_call>call:f{a:<|"|>"<tool_call|><|"|>}<tool_call|>',
            "",
            [("f", '{"a": "\\"<tool_call|>"}')],
        ),
        ("pythonic", "[get_time(), f(a=\"]b(c\", b='it\\'s')]", "", [TIME, ("f", '{"a": "]b(c", "b": "it\'s"}')]),
        # types, where the schema has one
        ("glm45", "<tool_call>f<arg_key>a</arg_key><arg_value>3</arg_value></tool_call>", "", [("f", '{"a": 3}')]),
        ("qwen3_coder", "<function=f>\n<parameter=a>\n3\n</parameter>\n</function>", "", [("f", '{"a": "3"}')]),
        (
            "qwen3_coder",
            "<function=set_flags>\n<parameter=enabled>\nTrue\n</parameter>\n<parameter=items>\n[1, 2]\n</parameter>\n"
            "<parameter=ratio>\nnull\n</parameter>\n<parameter=level>\nNaN\n</parameter>\n</function>",
            "",
            [("set_flags", '{"enabled": true, "items": [1, 2], "ratio": null, "level": "NaN"}')],
        ),
        (
            "gemma4",
            "<|tool_call>call:f{a:[],b:{},c:-1.5,d:on}<tool_call|>",
            "",
            [("f", '{"a": [], "b": {}, "c": -1.5, "d": "on"}')],
        ),
    ],
)
def test_hard_cases_have_one_reading(name: str, output: str, content: str, calls: list[tuple[str, str]]) -> None:
    form = answer_format(name, {"prompt_tail": ""})
    found = message(read(form, [output]), "")
    assert found["content"] == content
    assert [(call["name"], call["arguments"]) for call in found["tool_calls"]] == calls
    assert read(form, output) == read(form, [output])


@pytest.mark.parametrize(
    ("name", "begin", "rest"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments":', ' {"a": 1}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "1', '"}}'),
        ("llama3_json", '{"name": "f", "parameters": {"a": {}', "}}"),
        ("mistral", "[TOOL_CALLS]f[ARGS]", "{}"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ("kimi_k2", '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1', "}"),
        ("qwen3_coder", "<function=f>\n<parameter=a>\n1", "\n</parameter>\n</function>"),
        ("qwen3_coder", "<function=f>\n<parameter=a>\n1\n</parameter>", "\n</function>"),
        ("glm45", "<tool_call>get_time", "</tool_call>"),
        ("gemma4", "<|tool_call>call:f{a:1", "}"),
        ("gpt_oss", '<|channel|>commentary to=functions.f<|message|>{"a', '": 1}'),
    ],
)
def test_a_call_counts_as_one_when_it_is_closed(name: str, begin: str, rest: str) -> None:
    form = answer_format(name, {"prompt_tail": ""})
    cut, closed = AnswerScanner(form), AnswerScanner(form)
    parts = cut.push(begin) + cut.finish()
    assert Arguments("{}") not in parts
    assert sum(isinstance(part, Call) for part in parts) == 1
    assert not cut.called
    closed.push(begin + rest)
    closed.finish()
    assert closed.called


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
@pytest.mark.parametrize(
    "call",
    [
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}',
        '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "x"}}, "id": "1"}',
        '{"id": "1", "function": {"arguments": {"city": "x"}, "name": "get_weather"}}',
        '{"name": "get_time", "parameters": null}',
    ],
)
def test_forms_of_a_json_call_are_read_bare_and_marked(name: str, call: str) -> None:
    marked = f"<tool_call>{call}</tool_call> ok" if name == "hermes" else f"{call}; ok"
    form = answer_format(name, {"prompt_tail": ""})
    found = message(read(form, [marked]), "")
    assert [(each["name"], each["arguments"]) for each in found["tool_calls"]] == [TIME if "null" in call else WEATHER]
    assert found["content"] == " ok"
    assert read(form, marked) == read(form, [marked])


@pytest.mark.parametrize(
    ("name", "cut", "arguments"),
    [
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": {"b": "<tool_call>"</tool_call>',
            '{"a": {"b": "<tool_call>"',
        ),
        (
            "kimi_k2",
            '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": [1<|tool_call_end|>',
            '{"a": [1',
        ),
        ("deepseek_v3", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": {}<｜tool▁call▁end｜>', '{"a": {}'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": [[1]', '{"a": [[1]'),
        ("gemma4", "<|tool_call>call:f{a:1<tool_call|>", '{"a": 1'),
        ("gemma4", "<|tool_call>call:f{a}<tool_call|>", "{a}"),
        ("gpt_oss", '<|channel|>commentary to=functions.f<|message|>{"a": {}<|call|>', '{"a": {}'),
        ("glm45", "<tool_call>f\n<arg_key>a<arg_value>1</arg_value></tool_call>", "{a<arg_value>1</arg_value>"),
    ],
)
def test_a_marker_ends_a_damaged_call(name: str, cut: str, arguments: str) -> None:
    form = answer_format(name, {"prompt_tail": ""})
    found = message(read(form, [cut * 2]), "")
    assert [(call["name"], call["arguments"]) for call in found["tool_calls"]] == [("f", arguments)] * 2
    assert found["content"] == ""
    assert read(form, cut * 2) == read(form, [cut * 2])


def test_only_further_calls_are_left_out() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    form = AnswerFormat("hermes", None, tools=TOOLS, one_call=True)
    assert read(form, [f"{call} mid {call} end {call}"]) == [Call("f", None), Arguments("{}"), Text(" mid end")]


@pytest.mark.parametrize("output", ['{"name": "get_time", "parameters": {}}', "[get_time()]"])
def test_bare_calls_are_read_behind_a_thought_that_is_shown(output: str) -> None:
    form = AnswerFormat("llama3" if output[0] == "{" else "pythonic", "think", tools=TOOLS, show_thoughts=True)
    parts = read(form, [f"<think>a</think>\n\n{output}"])
    assert parts == [Text("<think>a</think>"), Call("get_time", None), Arguments("{}")]


def test_damaged_answers_are_read_the_same_however_they_are_cut() -> None:
    rng = random.Random(0)
    bits = [
        '"',
        "{",
        "}",
        "[",
        "]",
        "\\",
        "\n",
        ",",
        ":",
        "<",
        "<tool_call>",
        "</think>",
        "é",
        "'",
        "(",
        "null",
        "\x00",
    ]
    stored = [each.values for each in cases()]
    for _ in range(400):
        name, _, case = rng.choice(stored)
        text = case["output"]
        for _ in range(rng.randint(1, 4)):
            at_, end = sorted(rng.randint(0, len(text)) for _ in range(2))
            text = rng.choice((text[:at_] + text[end:], text[:at_] + rng.choice(bits) + text[at_:]))
        form = answer_format(name, case)
        assert read(form, text) == read(form, [text])


def test_long_and_hostile_answers_are_read_in_linear_time() -> None:
    """Each, of some 40,000 characters, took seconds if an opener searched the rest of the text again."""
    for name, text in (
        ("hermes", '<tool_call>{"name":"x",' * 4000),
        ("pythonic", "\n[a(" * 20000),
        ("llama3_json", "{" * 50000),
        ("gemma4", "<|tool_call>call:x{a:" + "[" * 50000),
        ("mistral", "[TOOL_CALLS]a" * 10000),
        ("mistral", "[TOOL_CALLS]a" * 3000 + "{"),
        ("hermes", '<tool_call>{"a": [' * 2000 + "]" * 2000 + " x"),
        ("hermes", '<tool_call>{"name":"x","arguments":{}},{"a": [' * 2000 + "]" * 2000 + " x"),
        ("pythonic", "\n[a(" * 8000 + ")" * 8000 + " x"),
        ("pythonic", ("\n[a(" * 200 + ")" * 200) * 40),
        ("glm45", "<tool_call>x" * 4000 + "\n"),
        ("kimi_k2", "<|tool_call_begin|>" * 4000 + "<|tool_call_end|>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>" * 4000 + "<｜tool▁call▁end｜>"),
        ("qwen3_coder", "<function=" * 4000 + ">"),
        ("gemma4", "<|tool_call>call:" * 4000 + "\n"),
    ):
        before = time.process_time()
        read(answer_format(name, {"prompt_tail": ""}), [text])
        assert time.process_time() - before < 1, (name, text[:30])


def test_every_parser_name_stands_for_a_format() -> None:
    assert set(CALL_PARSERS.values()) == {HARMONY, *CALLS}
    assert set(THOUGHT_PARSERS.values()) == {HARMONY, *THOUGHTS}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "1", '"1"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": "integer"}, "230.0", "230"),
        ({"type": "number"}, "1", "1"),
        ({"type": "integer"}, "many", '"many"'),
        ({"type": "boolean"}, "False", "false"),
        ({"type": "object"}, "{'a': True}", '{"a": true}'),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", "5"),
        ({"enum": ["on", "1"]}, "1", '"1"'),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', '{"x": 1}'),
    ],
)
def test_raw_text_gets_the_type_of_the_schema(schema: dict[str, Any], text: str, value: str) -> None:
    root = {"properties": {"v": schema}, "$defs": {"Point": {"type": "object"}}}
    assert as_json(text, types_of(root, "v")) == value


def test_a_schema_with_many_references_to_itself_is_read_at_once() -> None:
    again = [{"$ref": "#/$defs/N"}] * 80
    root = {"properties": {"v": again[0]}, "$defs": {"N": {"anyOf": [*again, {"type": "integer"}]}}}
    before = time.process_time()
    assert types_of(root, "v") == {"integer"}
    assert time.process_time() - before < 1


def test_a_schema_that_names_no_type_says_so() -> None:
    for schema in ({}, {"$ref": "#/properties/v"}, {"$ref": "#/nowhere"}, True):
        assert types_of({"properties": {"v": schema}}, "v") == set()


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("<think>\nLet me see", "open"),
        ("<think>a</think>\nSo", "closed"),
        ("<think>a</think><user>b<think>c", "open"),
        ("So", "closed"),
    ],
)
def test_a_message_that_goes_on_is_in_its_thought_or_behind_it(prompt: str, state: str) -> None:
    assert thought_state(prompt, "think", continues=True) == state
