"""JSON schemas as the grammar library shall take them: every keyword enforced or refused, and white space bounded."""

from collections.abc import Iterator

from sgl_jax.request import Json

# White space between the parts of a JSON text is one space, or a new line with its indentation. Without a bound some models
# write white space until the answer is full.
_WHITESPACE = r" |\r?\n[ \t]{0,24}"
_OPTIONS: Json = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "lenient": False}
_PASSED_OVER = {"nullable": 'it is OpenAPI\'s; write "type": [..., "null"]'}  # by the library, in silence
_ONE = ("additionalProperties", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_BY_NAME = ("$defs", "definitions", "patternProperties", "properties")


def enforced(schema: Json) -> dict[str, Json]:
    """Return a schema with the library's options. Raises ValueError for one that would not be enforced as it is written."""
    if schema is True:  # any value
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"a schema must be a JSON object; it is {str(schema)[:40]}")
    for each in _schemas(schema):
        for keyword, cure in _PASSED_OVER.items():
            if each.get(keyword):
                raise ValueError(f"{keyword} is not a keyword of JSON Schema: {cure}")
    return {**schema, "x-guidance": _OPTIONS}


def _schemas(schema: Json) -> Iterator[dict[str, Json]]:
    """Yield a schema and all that are in it."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):
            continue
        yield each
        waiting += [each[name] for name in _ONE if name in each]
        for name in (*_LISTS, *_BY_NAME):
            inner = each.get(name)
            waiting += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
