"""Calls with a pair of tags around each argument (Qwen3-Coder, GLM, DeepSeek V3.2): values of strings are raw text."""

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from sgl_jax.constrained.lark import GrammarError, Lark
from sgl_jax.constrained.schema import enforced, schemas_in
from sgl_jax.request import Json
from sgl_jax.text.tool_calls.answer_form import CallableFunction
from sgl_jax.text.tool_calls.schemas import types_of


class Tagging(NamedTuple):
    """Texts around the parts of a call. {name}, {key} and {string} (whether the value is raw text) are filled in."""

    begin: str
    value_begin: str
    value_end: str
    end: str


CODER = Tagging(
    "<tool_call>\n<function={name}>\n", "<parameter={key}>\n", "\n</parameter>\n", "</function>\n</tool_call>"
)
GLM = Tagging("<tool_call>{name}\n", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>")
DSML = Tagging(
    '<｜DSML｜invoke name="{name}">\n',
    '<｜DSML｜parameter name="{key}" string="{string}">',
    "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>",
)

_KEY = "{key}"
_OF_CALLS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "x-guidance",
    "$defs",
    "definitions",
    "$schema",
    "$id",
}
ABOUT = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_OF_TEXT = {"type", "enum", "const", "anyOf", "oneOf", "$ref", *ABOUT}


def tagged_call(tags: Tagging, lark: Lark, function: CallableFunction) -> str:
    """Return calls of a function, with its parameters in the order of its schema. Raises GrammarError."""
    root = _properties_of(function)
    properties, required = root.get("properties"), root.get("required")
    if not isinstance(properties, dict):
        parameters = f"{_any_parameter(tags, lark)}*"
    else:
        musts = required if isinstance(required, list) else []
        written = [(_parameter(tags, lark, function, key), key in musts) for key in properties]
        parameters = " ".join(text if must else f"({text})?" for text, must in written)
    begin, end = (_filled(part, name=function.name) for part in (tags.begin, tags.end))
    return f"{lark.literal(begin)} {parameters} {lark.literal(end)}"


def _properties_of(function: CallableFunction) -> Mapping[str, Json]:
    """Return the schema of a function's arguments where it consists of their own schemas. Raises GrammarError for others."""
    root = function.arguments
    if other := next((key for key in root if key not in _OF_CALLS and key not in ABOUT), None):
        raise GrammarError(
            f"{other} beside the properties of {function.name} cannot be enforced in this format of calls"
        )
    return root


def _value_of(function: CallableFunction, key: str) -> dict[str, Json]:
    """Return the schema of an argument, with the definitions that it may refer to."""
    root, properties = function.arguments, function.arguments["properties"]
    schema = properties[key] if isinstance(properties, dict) else None
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise GrammarError(f"the schema of {key} must be a JSON object")
    return enforced({**{name: root[name] for name in ("$defs", "definitions") if name in root}, **schema})


def _texts_of(function: CallableFunction, key: str, schema: Mapping[str, Json]) -> list[Json] | None:
    """Return the values of an argument that may be text. None: it may be any text. Raises GrammarError for what cannot be
    enforced in raw text."""
    used = {name: each for name, each in schema.items() if name not in ("$defs", "definitions", "x-guidance")}
    for each in schemas_in(used):
        if other := next((name for name in each if name not in _OF_TEXT), None):
            raise GrammarError(f"{other} of {function.name}'s {key} cannot be enforced in this format of calls")
    values = used["enum"] if "enum" in used else [used["const"]] if "const" in used else None
    return values if isinstance(values, list) else None


def _parameter(tags: Tagging, lark: Lark, function: CallableFunction, key: str) -> str:
    schema = _value_of(function, key)
    types = types_of({"properties": {key: schema}, **_definitions(schema)}, key)
    is_text = "string" in types or not types
    begin = lark.literal(_filled(tags.value_begin, key=key, string="true" if is_text else "false"))
    if not is_text:
        return f"{begin} {lark.schema(schema)} {lark.literal(tags.value_end)}"
    if (values := _texts_of(function, key, schema)) is None:
        return f"{begin} {lark.text_until(tags.value_end)}"
    written = (each if isinstance(each, str) else json.dumps(each) for each in values)
    return f"{begin} {lark.choice(map(lark.literal, written))} {lark.literal(tags.value_end)}"


def _any_parameter(tags: Tagging, lark: Lark) -> str:
    before, _, behind = _filled(tags.value_begin, key=_KEY, string="true").partition(_KEY)
    head = f"{lark.literal(before)} /[A-Za-z0-9_.-]{{1,64}}/ {lark.literal(behind)}"
    return lark.rule(f"{head} {lark.text_until(tags.value_end)}")


def _definitions(schema: Mapping[str, Json]) -> dict[str, Json]:
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}


def _filled(text: str, **values: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)
