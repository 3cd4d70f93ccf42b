"""Tests of reading answers: thoughts, text and calls of every format, which must not depend on how the text was cut."""

import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.scanner import AnswerFormat, AnswerScanner, thought_state

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
