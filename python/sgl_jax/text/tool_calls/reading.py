"""The contract of parsers of calls."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sgl_jax.text.tool_calls.answer import Answer
from sgl_jax.text.tool_calls.pieces import Source, Waiting
from sgl_jax.text.tool_calls.schemas import Schema


class Reading(NamedTuple):
    """Work of a parser of calls. It begins a call in the answer and ends it, or leaves the answer as it is: then the text
    is content."""

    source: Source
    answer: Answer
    tools: Mapping[str, Schema]  # parameters by name
    types: Callable[[str, str], frozenset[str]]  # types of a parameter, by its tool's name and its own


def object_arguments(reading: Reading) -> Waiting[None]:
    """Read the JSON object that is the arguments of a call that has begun, and end the call."""
    first = yield from reading.source.skip_space()
    whole = (yield from reading.source.nested(reading.answer.arguments)) if first == "{" else bool(first)
    reading.answer.end_call(whole)


def is_name(text: str) -> bool:
    """Return whether a tool may have this name. Others tell that a text is no call."""
    return bool(text) and not any(char.isspace() or char in "<>{}[]()\"'|" for char in text)
