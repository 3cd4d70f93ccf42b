"""JSON schemas as the grammar library shall take them: every keyword enforced or refused, and white space bounded."""

import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

from sgl_jax.request import Json

# White space between the parts of a JSON text is one space, or a new line with its indentation. Without a bound some models
# write white space until the answer is full.
_WHITESPACE = r" |\r?\n[ \t]{0,24}"
_OPTIONS: Json = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": False}
_PASSED_OVER = {  # by the library, in silence
    "nullable": 'it is OpenAPI\'s; write "type": [..., "null"]',
    "divisibleBy": "it is of an old draft; write multipleOf",
    "disallow": "it is of an old draft, and its successor not cannot be enforced",
    "extends": "it is of an old draft; write allOf",
}
_IN_SCHEMAS = ("additionalItems", "additionalProperties", "allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = ("$defs", "definitions", "patternProperties", "properties")
_MOST_MULTIPLE = 100_000  # the library needs a state for each remainder


def enforced(schema: Json) -> dict[str, Json]:
    """Return a schema with the library's options, and without names of properties that must be strings, as all are. Raises
    ValueError for one that would not be enforced as it is written."""
    if schema is True:  # any value
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be a JSON object; it is {str(schema)[:40]}")
    multiple = 1
    for each in schemas_in(schema):
        for keyword, cure in _PASSED_OVER.items():
            if each.get(keyword):
                raise ValueError(f"{keyword} is not a keyword of JSON Schema: {cure}")
        if each.get("propertyNames") == {"type": "string"}:
            del each["propertyNames"]
        if "multipleOf" in each:
            multiple = math.lcm(multiple, _digits(each["multipleOf"]))
            if multiple > _MOST_MULTIPLE:
                text = (
                    f"multipleOf is {each['multipleOf']}: so large a divisor, with those beside it, cannot be enforced"
                )
                raise ValueError(text)
    return {**schema, "x-guidance": _OPTIONS}


def schemas_in(schema: Json) -> Iterator[dict[str, Json]]:
    """Yield a schema, all that are in it, and those that it refers to."""
    waiting, seen = [schema], set[str]()
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):
            continue
        yield each
        for name in (*_IN_SCHEMAS, *_BY_NAME):
            inner = each.get(name)
            waiting += inner if isinstance(inner, list) else [inner] if name in _IN_SCHEMAS else _values(inner)
        reference = each.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            waiting.append(referred(schema, reference))


def referred(root: Json, reference: str) -> Json:
    """Return the part of a schema that a reference such as #/$defs/Point names. None: there is none."""
    found = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        found = found if not key else found.get(key) if isinstance(found, dict) else None
    return found


def _values(schemas: Json) -> list[Json]:
    return [*schemas.values()] if isinstance(schemas, dict) else []


def _digits(number: Json) -> int:
    """Return a number's decimal digits, without the zeros around them, as a whole number."""
    try:
        digits = Decimal(str(number)).normalize().as_tuple().digits
    except InvalidOperation:
        return 1  # the library refuses it
    return int("".join(map(str, digits))) or 1
