"""Calls as JSON objects: {"name": …, "arguments": {…}}, one, several, or in a list."""

from sgl_jax.text.tool_calls.pieces import Emit, Source, Waiting
from sgl_jax.text.tool_calls.reading import Reading, is_name, object_arguments

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "function", "id", "type", *_ARGUMENTS)


def marked(reading: Reading, opener: str) -> Waiting[None]:
    """Read objects, each a call, between the markers of calls."""
    yield from _objects(reading, bare=False, id_comes_last=False)


def bare(reading: Reading, opener: str) -> Waiting[None]:
    """Read an answer that consists of calls. Other objects and lists are content."""
    if opener in ("{", "["):
        if not reading.answer.fresh:
            return
        reading.source.back(opener)
    yield from _objects(reading, bare=True, id_comes_last=False)


def mistral(reading: Reading, opener: str) -> Waiting[None]:
    """Read Mistral's calls: a list of objects, or name, id and arguments behind markers of their own."""
    source, answer = reading.source, reading.answer
    if (yield from source.skip_space()) in ("{", "["):
        yield from _objects(reading, bare=False, id_comes_last=True)
        return
    name, word = yield from source.header(("[CALL_ID]", "[ARGS]", "{"))
    call_id = None
    if word == "[CALL_ID]":
        call_id, word = yield from source.header(("[ARGS]",))
    if word == "{":
        source.back(word)
    if word and is_name(name.strip()):
        answer.call(name.strip(), call_id and call_id.strip())
        yield from object_arguments(reading)


def _objects(reading: Reading, bare: bool, id_comes_last: bool) -> Waiting[None]:
    source, answer = reading.source, reading.answer
    first = answer.num_calls
    listed = yield from source.take(("[",))
    while True:
        start, before = source.position, answer.num_calls
        if (yield from source.take(("{",))):
            yield from _object(reading, bare, id_comes_last)
        if answer.num_calls == before:
            if before > first:  # no call follows the others; else the caller tries again
                answer.text(source.retry(start))
            break
        separator = yield from source.take((",", ";") if listed or bare else (",",))
        if not separator and not (yield from source.after_space(("{",))):
            break
    if listed and answer.num_calls > first:
        yield from source.take(("]",))


def _object(reading: Reading, bare: bool, id_comes_last: bool) -> Waiting[None]:
    """Read an object behind its `{`. The call begins with the arguments, or at the end where the name comes after them.

    `bare`: an object with other keys, or without arguments, is no call.
    """
    source, answer = reading.source, reading.answer
    said: dict[str, str | None] = {}
    kept: list[str] | None = None  # arguments until the call can begin
    begun = closed = False
    whole = True  # the arguments have ended
    depth = 1
    while True:
        char = yield from source.skip_space()
        if char in ("}", ","):
            yield from source.take((char,))
        depth -= char == "}"
        closed = depth == 0
        if closed or char not in ('"', ",", "}"):
            break
        if char != '"':
            continue
        key = yield from source.json_string()
        if key is None or not (yield from source.take((":",))):
            break
        if key in _ARGUMENTS and kept is None:
            begins = yield from source.skip_space()
            name = said.get("name")
            begun = bool(name) and not id_comes_last and (begins == "{" or not bare)
            if begun and name:
                answer.call(name, said.get("id"))
            kept = []
            whole = yield from _value(source, answer.arguments if begun else kept.append, begins)
            if bare and "".join(kept)[:1] not in ("", "{"):
                return
        elif key == "function" and (yield from source.take(("{",))):
            depth += 1
        elif (yield from source.skip_space()) == '"':
            said["name" if key == "function" else key] = yield from source.json_string()
        else:
            yield from _value(source, lambda text: None, (yield from source.skip_space()))
        if bare and not begun and key not in _KEYS:
            return
    if not begun and (name := said.get("name")) and (kept is not None or (closed and not bare)):
        answer.call(name, said.get("id"))
        answer.arguments("".join(kept or []))
        begun = True
    if begun:
        answer.end_call(whole or bool((yield from source.peek())))


def _value(source: Source, emit: Emit, first: str) -> Waiting[bool]:
    """Emit a value that begins with the character `first`. A string may have the value in it, and null is none. False: the
    end came first."""
    if first and first in "{[":
        return (yield from source.nested(emit))
    if first == '"':
        text = yield from source.json_string()
        emit(text or "")
        return text is not None
    parts: list[str] = []
    word = yield from source.until((",", "}", "\n"), parts.append)
    source.back(word)
    text = "".join(parts).strip()
    emit("" if text == "null" else text)
    return bool(word)
