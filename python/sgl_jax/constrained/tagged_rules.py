"""Calls with a pair of tags around each argument (Qwen3-Coder, GLM, DeepSeek V3.2): values of strings are raw text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sgl_jax.constrained.lark import GrammarError, Lark
from sgl_jax.constrained.schema import enforced, referred
from sgl_jax.request import Json
from sgl_jax.text.tool_calls.answer_form import CallableFunction

type Schema = Mapping[str, Json]


class Tagging(NamedTuple):
    """Texts around the parts of a call, with the function's name and the argument's in the place of %s."""

    begin: str
    text_begin: str  # begins a value that is raw text
    json_begin: str
    value_end: str
    end: str
    not_in_text: tuple[str, ...]  # the reader ends a value at these


_CODER_VALUE = "<parameter=%s>\n"
_GLM_VALUE = "<arg_key>%s</arg_key>\n<arg_value>"
_DSML_VALUE = '<｜DSML｜parameter name="%s" string="{}">'

CODER = Tagging(
    "<tool_call>\n<function=%s>\n",
    _CODER_VALUE,
    _CODER_VALUE,
    "\n</parameter>\n",
    "</function>\n</tool_call>",
    ("<parameter=", "</parameter>", "</function>", "</tool_call>"),
)
GLM = Tagging("<tool_call>%s\n", _GLM_VALUE, _GLM_VALUE, "</arg_value>\n", "</tool_call>", ("</arg_value>",))
DSML = Tagging(
    '<｜DSML｜invoke name="%s">\n',
    _DSML_VALUE.format("true"),
    _DSML_VALUE.format("false"),
    "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>",
    ("</｜DSML｜parameter>",),
)

ABOUT = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
DEFINITIONS = ("$defs", "definitions")
_OF_CALLS = {"type", "properties", "required", "additionalProperties", "x-guidance", *DEFINITIONS, "$schema", "$id"}
_OF_STRINGS = {"pattern", "format", "minLength", "maxLength", "contentEncoding", "contentMediaType", "contentSchema"}
KEY = r"/[^\s\"<>:{}\[\],]([^\"<>:{}\[\],\r\n]{0,126}[^\s\"<>:{}\[\],])?/"  # an argument's name


class _Text(NamedTuple):
    text: str | None  # None: any


def tagged_call(tags: Tagging, lark: Lark, function: CallableFunction) -> str:
    """Return calls of a function, with its parameters in the order of its schema. Raises GrammarError."""
    root = function.arguments
    properties, musts = members_of(function.name, root, _OF_CALLS)
    if properties is None:
        parameters = f"{_argument(tags, lark, None, [_Text(None), enforced({})])}*"
    else:
        values = {key: [*_values(root, each, f"{function.name}'s {key}")] for key, each in properties.items()}
        written = [(_argument(tags, lark, key, each), key in musts) for key, each in values.items()]
        parameters = " ".join(text if must else f"({text})?" for text, must in written)
    return f"{lark.literal(tags.begin % function.name)} {parameters} {lark.literal(tags.end)}"


def members_of(name: str, schema: Schema, known: set[str]) -> tuple[Schema | None, list[str]]:
    """Return an object's properties, and the names of those that must be there. None: it has whatever it likes. Raises
    GrammarError for what else the schema says."""
    if other := next((key for key in schema if key not in known and key not in ABOUT), None):
        raise cannot(f"{other} beside the properties", name)
    properties, further, required = (schema.get(key) for key in ("properties", "additionalProperties", "required"))
    musts = [str(key) for key in required] if isinstance(required, list) else []
    if not isinstance(properties, dict):
        if further not in (None, True, False, {}):
            raise cannot("additionalProperties", name)
        properties = {} if further is False else None
    if missing := [key for key in musts if key not in (properties or {})]:
        raise cannot(f"required {missing[0]}, which is not among the properties,", name)
    return properties, musts


def cannot(what: str, where: str) -> GrammarError:
    return GrammarError(f"{what} of {where} cannot be enforced in this format of calls")


def _argument(tags: Tagging, lark: Lark, key: str | None, values: Sequence[_Text | Schema]) -> str:
    """Return an argument that has one of the values. None: with any name."""
    texts = [each.text for each in values if isinstance(each, _Text)]
    schemas = [each for each in values if not isinstance(each, _Text)]
    if None in texts and tags.text_begin == tags.json_begin:  # any text may be JSON, too
        for word in (
            word for each in schemas for word in each if word not in ("type", "x-guidance", *DEFINITIONS, *ABOUT)
        ):
            raise cannot(f"{word}, which stands beside any text,", str(key))
        schemas = []
    found = []
    if None in texts:
        found.append(f"{_begin(lark, tags.text_begin, key)} {lark.text_until(tags.value_end, tags.not_in_text)}")
    elif texts:
        written = lark.choice(lark.literal(text) for text in texts if text is not None)
        found.append(f"{_begin(lark, tags.text_begin, key)} {written} {lark.literal(tags.value_end)}")
    if schemas:
        written = lark.choice(lark.schema({**each}) for each in schemas)
        found.append(f"{_begin(lark, tags.json_begin, key)} {written} {lark.literal(tags.value_end)}")
    return lark.choice(found)


def _begin(lark: Lark, text: str, key: str | None) -> str:
    if key is not None:
        return lark.literal(text % key)
    before, behind = text.split("%s")
    return f"{lark.literal(before)} {KEY} {lark.literal(behind)}"


def _values(root: Schema, schema: Json, where: str, seen: tuple[str, ...] = ()) -> Iterator[_Text | Schema]:
    """Yield the values of an argument, those of strings as text and others as schemas. Raises GrammarError for what raw
    text cannot be held to."""
    if schema is True or (isinstance(schema, dict) and not schema.keys() - ABOUT):
        yield from (_Text(None), enforced({}))
        return
    if not isinstance(schema, dict):
        raise cannot(f"the schema {json.dumps(schema)[:40]}", where)
    for key in ("$ref", "anyOf", "oneOf"):
        if key in schema and (others := schema.keys() - ABOUT - {key}):
            raise cannot(f"{sorted(others)[0]} beside {key}", where)
    said = schema.get("type")
    types = [said] if isinstance(said, str) else [*map(str, said)] if isinstance(said, list) else []
    match schema:
        case {"$ref": str(reference)} if reference not in seen:
            yield from _values(root, referred({**root}, reference), where, (*seen, reference))
        case {"anyOf": list(parts)} | {"oneOf": list(parts)}:
            for part in parts:
                yield from _values(root, part, where, seen)
        case {"enum": list(values)}:
            yield from _constants(values, types)
        case {"const": value}:
            yield from _constants([value], types)
        case _ if types:
            yield from _typed(root, schema, types, where)
        case _:
            raise cannot(f"{next(iter(schema.keys() - ABOUT))} without type", where)


def _typed(root: Schema, schema: Schema, types: list[str], where: str) -> Iterator[_Text | Schema]:
    others = [each for each in types if each != "string"]
    if others:
        definitions = {name: root[name] for name in DEFINITIONS if name in root}
        yield enforced({**definitions, **schema, "type": others})
    if "string" not in types:
        return
    bounds = schema.keys() - ABOUT - {"type"} if others else schema.keys() & _OF_STRINGS
    if bounds:
        raise cannot(sorted(bounds)[0], where)
    yield _Text(None)


def _constants(values: list[Json], types: list[str]) -> Iterator[_Text | Schema]:
    for value in values:
        if not types or _kinds(value) & {*types}:
            yield _Text(value) if isinstance(value, str) else enforced({"const": value})


def _kinds(value: Json) -> set[str]:
    """Return the types of JSON Schema that a value has."""
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number", *(["integer"] if value.is_integer() else [])}
        case str():
            return {"string"}
        case None:
            return {"null"}
    return {"object"} if isinstance(value, Mapping) else {"array"}
