"""Types that a tool's schema allows for a parameter, and values in JSON for the text that a model wrote."""

import ast
import json
from collections.abc import Iterator, Mapping

from sgl_jax.request import Json

type Schema = Mapping[str, Json]

_TYPE_OF: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
_WORDS = {"True": "true", "False": "false", "None": "null", "TRUE": "true", "FALSE": "false"}


def types_of(parameters: Schema, name: str) -> frozenset[str]:
    """Return the JSON types that the schema of a tool's parameters allows for one of them; empty: it does not say."""
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, dict) else None
    return frozenset(_types(schema, parameters))


def _types(schema: Json, root: Schema) -> Iterator[str]:
    left, references = [schema], set[str]()
    while left:
        schema = left.pop()
        if not isinstance(schema, dict):
            continue
        if isinstance(reference := schema.get("$ref"), str):
            left += [] if reference in references else [_at(root, reference)]
            references.add(reference)
            continue
        if isinstance(said := schema.get("type"), str | list):
            yield from (each for each in ([said] if isinstance(said, str) else said) if isinstance(each, str))
            continue
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        yield from (_TYPE_OF[type(value)] for value in (values if isinstance(values, list) else ()))
        for key in ("anyOf", "oneOf", "allOf"):
            left += parts if isinstance(parts := schema.get(key), list) else []


def _at(root: Schema, reference: str) -> Json:
    """Return the part of the schema that a reference ("#/$defs/Point") names."""
    found: Json = dict(root)
    for key in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def as_json(text: str, types: frozenset[str]) -> str:
    """Return the JSON text for a value that was written as raw text. One that fits no type becomes a string."""
    found = None if types == {"string"} else _value(text.strip())
    if found is None:
        return dumped(text)
    bare, value = found
    kind = _TYPE_OF[type(value)]
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return str(int(value))
    fits = kind in types or (kind == "integer" and "number" in types)
    return bare if kind != "string" and (fits or "string" not in types) else dumped(text)


def dumped(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> tuple[str, Json] | None:
    """Return a value as JSON text and as itself, where the text is JSON, or a list or dictionary in Python's spelling."""
    text = _WORDS.get(text, text)
    try:
        return text, json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        if text[:1] not in ("{", "["):
            return None
    try:
        value = ast.literal_eval(text)
        return json.dumps(value, allow_nan=False), value
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which are no JSON
