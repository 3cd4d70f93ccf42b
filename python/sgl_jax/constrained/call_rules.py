"""Calls in the format of each family, as expressions in the library's notation. text.tool_calls.formats reads them."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from sgl_jax.constrained.gemma_rules import gemma_call
from sgl_jax.constrained.lark import Lark
from sgl_jax.constrained.tagged_rules import CODER, DSML, GLM, tagged_call
from sgl_jax.request import Json
from sgl_jax.text.tool_calls.answer_form import CallableFunction
from sgl_jax.text.tool_calls.sectioned_calls import DEEPSEEK, KIMI

_OF_ROOT = ("$defs", "definitions", "$schema", "$id", "x-guidance")  # keywords of a whole schema

type Around = tuple[str, str, str]  # literals before, between and behind calls


class CallRules(NamedTuple):
    call: Callable[[Lark, CallableFunction], str]
    around: Callable[[Lark], Around] = lambda lark: ("", "", "")


def _json_call(lark: Lark, function: CallableFunction, begin: str, arguments: str, end: str) -> str:
    head = f"{begin}{{{json.dumps('name')}: {json.dumps(function.name)}, {json.dumps(arguments)}: "
    return f"{lark.literal(head)} {lark.schema(function.arguments)} {lark.literal('}' + end)}"


def _hermes(lark: Lark, function: CallableFunction) -> str:
    return _json_call(lark, function, "<tool_call>\n", "arguments", "\n</tool_call>")


def _llama3(lark: Lark, function: CallableFunction) -> str:
    """Return calls as JSON, as a whole: content of JSON may stand in their place, and begins as they do."""
    root = {key: value for key, value in function.arguments.items() if key in _OF_ROOT}
    arguments = {key: value for key, value in function.arguments.items() if key not in _OF_ROOT}
    members: Json = {"name": {"const": function.name}, "parameters": arguments}
    call: dict[str, Json] = {"type": "object", "properties": members, "required": ["name", "parameters"]}
    return lark.schema({**root, **call, "additionalProperties": False})


def _mistral(lark: Lark, function: CallableFunction) -> str:
    if not lark.is_token("[ARGS]"):
        return _json_call(lark, function, "", "arguments", "")
    return f"{lark.literal(f'[TOOL_CALLS]{function.name}[ARGS]')} {lark.schema(function.arguments)}"


def _deepseek(lark: Lark, function: CallableFunction) -> str:
    """Return V3.1's form or that of V3 and R1."""
    schema = lark.schema(function.arguments)
    fenced = lark.literal(f"function{DEEPSEEK.separator}{function.name}\n```json\n")
    plain = lark.literal(f"{function.name}{DEEPSEEK.separator}")
    either = f"({plain} {schema} | {fenced} {schema} {lark.literal('\n```')})"
    return f"{lark.literal(DEEPSEEK.call)} {either} {lark.literal(DEEPSEEK.call_end)}"


def _kimi(lark: Lark, function: CallableFunction) -> str:
    head = f"{lark.literal(f'{KIMI.call}functions.{function.name}:')} /[0-9]{{1,4}}/ {lark.literal(KIMI.separator)}"
    return f"{head} {lark.schema(function.arguments)} {lark.literal(KIMI.call_end)}"


def _around(begin: str, between: str, end: str) -> Callable[[Lark], Around]:
    return lambda lark: (begin, between, end)


CALL_RULES: Mapping[str, CallRules] = {
    "hermes": CallRules(_hermes, _around("", "\n", "")),
    "qwen3_coder": CallRules(partial(tagged_call, CODER), _around("", "\n", "")),
    "glm45": CallRules(partial(tagged_call, GLM), _around("", "\n", "")),
    "llama3": CallRules(_llama3, _around("", "; ", "")),
    "pythonic": CallRules(_llama3, _around("", "; ", "")),  # whose models write JSON as well
    "mistral": CallRules(
        _mistral, lambda lark: ("", "", "") if lark.is_token("[ARGS]") else ("[TOOL_CALLS] [", ", ", "]")
    ),
    "deepseek_v3": CallRules(_deepseek, _around("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>")),
    "deepseek_v32": CallRules(
        partial(tagged_call, DSML), _around("<｜DSML｜function_calls>\n", "\n", "\n</｜DSML｜function_calls>")
    ),
    "kimi_k2": CallRules(_kimi, _around("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>")),
    "gemma4": CallRules(partial(gemma_call, "<|tool_call>", "<tool_call|>", '<|"|>')),
    "functiongemma": CallRules(partial(gemma_call, "<start_function_call>", "<end_function_call>", "<escape>")),
}
