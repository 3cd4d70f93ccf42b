"""Calls with a pair of tags around each argument (Qwen3-Coder, GLM, Ling, DeepSeek V3.2). Values are raw text, whose type
the tool's schema tells."""

from typing import NamedTuple

from sgl_jax.text.tool_calls import json_calls
from sgl_jax.text.tool_calls.pieces import Emit, Source, Waiting
from sgl_jax.text.tool_calls.reading import Reading, is_name
from sgl_jax.text.tool_calls.schemas import as_json, dumped

_ANY_JSON = frozenset({"array", "boolean", "integer", "null", "number", "object"})
_TEXT = frozenset({"string"})


class Tags(NamedTuple):
    """Markup of a call. Behind a key's and a name's text there may be attributes, from a quote on."""

    name: tuple[str, ...]  # begins the name, where the opener does not
    name_ends: tuple[str, ...]
    key: str
    key_end: str
    value: tuple[str, ...]  # begins a value, where the end of its key does not
    newline: bool  # one before a value belongs to the markup
    value_ends: tuple[str, ...]
    next_ends: tuple[str, ...]  # end a value as well, and are read again
    call_ends: tuple[str, ...]
    untyped: frozenset[str]  # types of a value of which the schema does not say one


CODER = Tags(
    name=("<function=",),
    name_ends=(">",),
    key="<parameter=",
    key_end=">",
    value=(),
    newline=True,
    value_ends=("\n</parameter>", "</parameter>"),
    next_ends=("\n<parameter=", "\n</function>"),
    call_ends=("</function>",),
    untyped=_TEXT | {"array", "object"},
)
GLM = Tags(
    name=(),
    name_ends=("\n", "<arg_key>", "</tool_call>"),
    key="<arg_key>",
    key_end="</arg_key>",
    value=("<arg_value>",),
    newline=False,
    value_ends=("</arg_value>",),
    next_ends=(),
    call_ends=("</tool_call>",),
    untyped=_TEXT | _ANY_JSON,
)
DSML = Tags(
    name=('<｜DSML｜invoke name="',),
    name_ends=(">",),
    key='<｜DSML｜parameter name="',
    key_end=">",
    value=(),
    newline=False,
    value_ends=("</｜DSML｜parameter>",),
    next_ends=(),
    call_ends=("</｜DSML｜invoke>",),
    untyped=_TEXT | _ANY_JSON,
)


def tagged(tags: Tags, reading: Reading, opener: str) -> Waiting[None]:
    """Read a call with these tags."""
    source, answer = reading.source, reading.answer
    if (yield from source.skip_space()) in ("{", "["):  # as JSON, which such models also write
        yield from json_calls.marked(reading, opener)
        return
    if tags.name and opener not in tags.name and not (yield from source.take(tags.name)):
        return
    header, word = yield from source.header(tags.name_ends)
    name = header.partition('"')[0].strip()
    if not is_name(name) or not (word or name in reading.tools):
        return
    source.back(word if word != ">" else "")
    if not (yield from source.after_space((tags.key, *tags.call_ends, "{"))) and not (yield from source.at_end()):
        return
    answer.call(name)
    if (yield from source.skip_space()) == "{":
        whole = yield from source.nested(answer.arguments)
    else:
        whole = yield from _arguments(tags, reading, name)
    ended = whole and bool((yield from source.take(tags.call_ends)))
    answer.end_call(ended or bool((yield from source.peek())))


def _arguments(tags: Tags, reading: Reading, name: str) -> Waiting[bool]:
    """Read arguments up to text that begins none. False: one is cut or malformed."""
    source, emit = reading.source, reading.answer.arguments
    before = "{"
    while (yield from source.take((tags.key,))):
        header, word = yield from source.read_until((tags.key_end, *source.markers))
        if word != tags.key_end or (tags.value and not (yield from source.take(tags.value))):
            source.back(word if word != tags.key_end else "")
            emit(before + header)
            return False
        key, _, attributes = header.partition('"')
        types = reading.types(name, key.strip()) or tags.untyped
        if 'string="' in attributes:
            types = _TEXT if 'string="true"' in attributes else _ANY_JSON
        emit(f"{before}{dumped(key.strip())}: ")
        before = ", "
        if tags.newline and (yield from source.next_is(("\n",))):
            yield from source.until(("\n",), emit)
        if types == _TEXT:
            emit('"')
            if not (yield from _value(tags, source, lambda text: emit(dumped(text)[1:-1]))):
                return False
            emit('"')
        else:
            parts: list[str] = []
            whole = yield from _value(tags, source, parts.append)
            emit(as_json("".join(parts), types) if whole else "".join(parts))
            if not whole:
                return False
    emit("}" if before == ", " else "")
    return True


def _value(tags: Tags, source: Source, emit: Emit) -> Waiting[bool]:
    """Emit a value up to its end tag, behind which the next tag follows: others are part of it. False: it has no end."""
    follows = (tags.key, *tags.call_ends, "</tool_call>")
    while True:
        word = yield from source.until((*tags.value_ends, *tags.next_ends), emit)
        if word in tags.next_ends:
            source.back(word)
            return True
        if not word or (yield from source.after_space(follows)) or (yield from source.at_end()):
            return bool(word)
        emit(word)
