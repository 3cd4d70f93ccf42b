"""Gemma's calls: call:NAME{key:value,…}, whose strings stand between marks."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sgl_jax.constrained.lark import GrammarError, Lark
from sgl_jax.constrained.schema import enforced, referred
from sgl_jax.constrained.tagged_rules import ABOUT, DEFINITIONS, KEY, cannot, members_of
from sgl_jax.request import Json
from sgl_jax.text.tool_calls.answer_form import CallableFunction

_TYPES = ("string", "object", "array", "integer", "number", "boolean", "null")
_KNOWN = {
    "type",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "$ref",
    *ABOUT,
}
_TOP = {"x-guidance", "$schema", "$id", *DEFINITIONS}


def gemma_call(begin: str, end: str, quote: str, lark: Lark, function: CallableFunction) -> str:
    """Return calls of a function, with its parameters in the order of its schema. Raises GrammarError."""
    schema = {key: value for key, value in function.arguments.items() if key not in _TOP}
    value = _Values(lark, quote, function).of(schema)
    return f"{lark.literal(f'{begin}call:{function.name}')} {value} {lark.literal(end)}"


class _Values(NamedTuple):
    lark: Lark
    quote: str
    function: CallableFunction
    seen: tuple[str, ...] = ()  # references on the way

    def of(self, schema: Json) -> str:
        """Return the values of a schema, as Gemma writes them."""
        if schema is True:
            return self.any()
        if not isinstance(schema, dict):
            raise cannot("the schema false", self.function.name)
        for key in ("$ref", "anyOf", "oneOf"):
            if key in schema and (others := schema.keys() - ABOUT - {key}):
                raise cannot(f"{sorted(others)[0]} beside {key}", self.function.name)
        match schema:
            case {"$ref": str(reference)} if reference not in self.seen:
                inside = self._replace(seen=(*self.seen, reference))
                return inside.of(referred(self.function.arguments, reference))
            case {"anyOf": list(parts)} | {"oneOf": list(parts)}:
                return self.lark.choice(map(self.of, parts))
            case {"enum": list(values)}:
                return self.lark.choice(map(self._constant, values))
            case {"const": value}:
                return self._constant(value)
        said = schema.get("type", _TYPES)
        types = [said] if isinstance(said, str) else said if isinstance(said, Sequence) else ()
        return self.lark.choice(self._of_type(str(each), schema) for each in types)

    def any(self) -> str:
        """Return any value, up to a depth that calls have."""
        value = self.lark.choice([self._string(), *(self._plain(each, {}) for each in _TYPES[3:])])
        for _ in range(3):
            value = self.lark.choice([value, self._list(value), self._object(f'{KEY} ":" {value}')])
        return value

    def _of_type(self, name: str, schema: Mapping[str, Json]) -> str:
        if name not in _TYPES:
            raise GrammarError(f"type {name} in the arguments of {self.function.name} is none of {', '.join(_TYPES)}")
        if name not in ("string", "array", "object"):
            return self._plain(name, schema)
        if other := next((key for key in schema if key not in _KNOWN), None):
            raise cannot(other, self.function.name)
        if name == "string":
            return self._string()
        if name == "array":
            return self._list(self.of(schema["items"]) if "items" in schema else self.any())
        further = schema.get("additionalProperties")
        if "properties" not in schema and isinstance(further, dict):
            return self._object(f'{KEY} ":" {self.of(further)}')
        properties, musts = members_of(self.function.name, schema, _KNOWN)
        if properties is None:
            return self._object(f'{KEY} ":" {self.any()}')
        members = [f"{self.lark.literal(f'{key}:')} {self.of(each)}" for key, each in properties.items()]
        return self._members(members, [key in musts for key in properties])

    def _plain(self, name: str, schema: Mapping[str, Json]) -> str:
        """Return numbers and words, which are those of JSON."""
        return self.lark.schema(enforced({**schema, "type": name}))

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
