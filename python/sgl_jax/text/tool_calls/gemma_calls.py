"""Gemma's calls: call:NAME{key:value,…}, with strings between marks, and keys and words bare."""

from sgl_jax.text.tool_calls.pieces import Emit, Source, Waiting
from sgl_jax.text.tool_calls.reading import Reading, is_name
from sgl_jax.text.tool_calls.schemas import as_json, dumped

_WORDS = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_CLOSE = {"{": "}", "[": "]"}


def gemma(quote: str, reading: Reading, opener: str) -> Waiting[None]:
    """Read a call whose strings stand between `quote` marks."""
    source, answer = reading.source, reading.answer
    if not (yield from source.take(("call:",))):
        return
    name, word = yield from source.header(("{", "\n"))
    if word == "{" and is_name(name.strip()):
        answer.call(name.strip())
        source.back(word)
        answer.end_call((yield from _value(quote, source, answer.arguments)))


def _value(quote: str, source: Source, emit: Emit) -> Waiting[bool]:
    """Emit the bracketed value that comes next as JSON. False: the end came first."""
    closers: list[str] = []
    comma = ""  # before the next entry
    at_key = False
    while True:
        char = yield from source.skip_space()
        if not char or (yield from source.next_is(source.markers)):
            return bool(char)
        if char in "}],":
            yield from source.take((char,))
            if char == ",":
                at_key = closers[-1] == "}"
                continue
            emit(closers.pop())
            if not closers:
                return True
            comma = ", "
        elif at_key:
            key, word = yield from source.read_until((":", *source.markers))
            if word != ":":
                source.back(word)
                emit(comma + key.strip())
                return bool(word)
            emit(f"{comma}{dumped(key.replace(quote, '').strip().strip('"'))}: ")
            comma, at_key = "", False
        elif char in _CLOSE:
            yield from source.take((char,))
            emit(comma + char)
            closers.append(_CLOSE[char])
            comma, at_key = "", char == "{"
        else:
            emit(comma)
            yield from _scalar(quote, source, emit)
            comma = ", "


def _scalar(quote: str, source: Source, emit: Emit) -> Waiting[None]:
    """Emit a string, a number or a word. Words that JSON does not have become strings."""
    if (yield from source.take((quote,))):
        emit('"')
        emit('"' if (yield from source.until((quote,), lambda text: emit(dumped(text)[1:-1]))) else "")
    elif (yield from source.peek()) == '"':
        emit(dumped((yield from source.json_string()) or ""))
    else:
        text, word = yield from source.read_until((",", "}", "]", *source.markers))
        source.back(word)
        emit(as_json(text.strip(), _WORDS))
