"""Calls as a name, a separator and arguments, between markers of their own (DeepSeek V3 and V3.1, Kimi)."""

import re
from typing import NamedTuple

from sgl_jax.text.tool_calls.pieces import Waiting
from sgl_jax.text.tool_calls.reading import Reading, is_name, object_arguments


class Section(NamedTuple):
    call: str
    separator: str
    call_end: str


DEEPSEEK = Section("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
KIMI = Section("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

_KIMI_ID = re.compile(r"(?:functions?[._:]?)?(?P<name>.+?)(?:[:_.]?\d+)?")


def deepseek(reading: Reading, opener: str) -> Waiting[None]:
    """Read a call. V3 and R1 write `function` before the separator and a fence around the arguments."""
    source, answer = reading.source, reading.answer
    if not (yield from _header(DEEPSEEK, reading, opener)):
        return
    name, word = yield from source.header((DEEPSEEK.separator, DEEPSEEK.call_end))
    if name.strip() == "function" and word == DEEPSEEK.separator:
        name, word = yield from source.header(("\n", "{", DEEPSEEK.call_end))
        source.back(word if word != "\n" else "")
        yield from source.take(("```json", "```"))
    if word and is_name(name.strip()):
        answer.call(name.strip())
        yield from object_arguments(reading)
        yield from source.take(("```",))


def kimi(reading: Reading, opener: str) -> Waiting[None]:
    """Read a call, whose id has the tool's name in it."""
    source, answer = reading.source, reading.answer
    if not (yield from _header(KIMI, reading, opener)):
        return
    call_id, word = yield from source.header((KIMI.separator, KIMI.call_end))
    call_id = call_id.strip()
    if word == KIMI.separator and (name := _kimi_name(call_id, reading)):
        answer.call(name, call_id)
        yield from object_arguments(reading)


def _header(section: Section, reading: Reading, opener: str) -> Waiting[bool]:
    return opener == section.call or bool((yield from reading.source.take((section.call,))))


def _kimi_name(call_id: str, reading: Reading) -> str | None:
    """Return the tool that an id names: functions.NAME:N, or what models make of it after ids of another kind."""
    plain = call_id.removeprefix("functions.").rpartition(":")
    if is_name(plain[0]) and plain[2].isdigit():
        return plain[0]
    match = _KIMI_ID.fullmatch(call_id)
    known = (call_id, match["name"] if match else "")
    return next((name for name in known if name in reading.tools), None)
