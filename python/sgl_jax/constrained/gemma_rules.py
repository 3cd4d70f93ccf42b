"""Gemma's calls: call:NAME{key:value,…}, whose strings stand between marks."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sgl_jax.constrained.lark import GrammarError, Lark
from sgl_jax.constrained.tagged_rules import ABOUT
from sgl_jax.request import Json
from sgl_jax.text.tool_calls.answer_form import CallableFunction

_NUMBER = r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/"
_WORDS = {
    "integer": r"/-?(0|[1-9][0-9]{0,15})/",
    "number": _NUMBER,
    "boolean": '("true" | "false")',
    "null": '"null"',
}
_TYPES = ("string", "object", "array", *_WORDS)
_KNOWN = {"type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items", *ABOUT}
_TOP = {"x-guidance", "$schema", "$id"}
_KEY = "/[A-Za-z0-9_.-]{1,64}/"


def gemma_call(begin: str, end: str, quote: str, lark: Lark, function: CallableFunction) -> str:
    """Return calls of a function, with its parameters in the order of its schema. Raises GrammarError."""
    schema = {key: value for key, value in function.arguments.items() if key not in _TOP}
    value = _Values(lark, quote, function.name).of(schema)
    return f"{lark.literal(f'{begin}call:{function.name}')} {value} {lark.literal(end)}"


class _Values(NamedTuple):
    lark: Lark
    quote: str
    name: str  # the function

    def of(self, schema: Json) -> str:
        """Return the values of a schema, as Gemma writes them."""
        if schema is True:
            return self.any()
        if not isinstance(schema, dict) or (other := next((key for key in schema if key not in _KNOWN), None)):
            other = other if isinstance(schema, dict) else "false"
            raise GrammarError(f"{other} in the arguments of {self.name} cannot be enforced in this format of calls")
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            return self.lark.choice(map(self._constant, values if isinstance(values, list) else []))
        if isinstance(parts := schema.get("anyOf"), list) and not (schema.keys() - ABOUT - {"anyOf"}):
            return self.lark.choice(map(self.of, parts))
        if "anyOf" in schema:
            raise GrammarError(
                f"anyOf beside other keywords in the arguments of {self.name} cannot be enforced in this format of calls"
            )
        said = schema.get("type", _TYPES)
        types = [said] if isinstance(said, str) else said if isinstance(said, Sequence) else ()
        return self.lark.choice(self._of_type(str(each), schema) for each in types)

    def any(self) -> str:
        """Return any value, up to a depth that calls have."""
        value = self.lark.choice([self._string(), _NUMBER, *(_WORDS[name] for name in ("boolean", "null"))])
        for _ in range(3):
            value = self.lark.choice([value, self._list(value), self._object(f'{_KEY} ":" {value}')])
        return value

    def _of_type(self, name: str, schema: Mapping[str, Json]) -> str:
        match name:
            case "string":
                return self._string()
            case "array":
                return self._list(self.of(schema["items"]) if "items" in schema else self.any())
            case "object" if isinstance(properties := schema.get("properties"), dict):
                required = schema.get("required", [])
                members = [f"{self.lark.literal(f'{key}:')} {self.of(each)}" for key, each in properties.items()]
                musts = [isinstance(required, list) and key in required for key in properties]
                return self._members(members, musts)
            case "object":
                return self._object(f'{_KEY} ":" {self.any()}')
            case _ if name in _WORDS:
                return _WORDS[name]
        raise GrammarError(f"type {name} in the arguments of {self.name} is none of {', '.join(_TYPES)}")

    def _members(self, members: list[str], musts: list[bool]) -> str:
        """Return an object of members in order, of which some may be left out."""
        rest, starts = (
            "",
            list[str](),
        )  # texts that may follow a member, and the members from each on that can be the first
        for member, must in zip(reversed(members), reversed(musts), strict=True):
            starts = [f"{member} {rest}", *([] if must else starts)]
            behind = f'"," {member}'
            rest = self.lark.rule(f"{behind if must else f'({behind})?'} {rest}")
        inner = f"({self.lark.choice(starts)}){'' if any(musts) else '?'}" if starts else ""
        return f'"{{" {inner} "}}"'

    def _list(self, item: str) -> str:
        return f'"[" ({item} ("," {item})*)? "]"'

    def _object(self, member: str) -> str:
        return f'"{{" ({member} ("," {member})*)? "}}"'

    def _string(self) -> str:
        return f"{self.lark.literal(self.quote)} {self.lark.text_until(self.quote)}"

    def _constant(self, value: Json) -> str:
        return self.lark.literal(f"{self.quote}{value}{self.quote}" if isinstance(value, str) else json.dumps(value))
