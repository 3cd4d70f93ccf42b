"""The contract of parsers of calls."""

from collections.abc import Mapping
from typing import NamedTuple

from sgl_jax.text.tool_calls.answer import Answer
from sgl_jax.text.tool_calls.pieces import Source
from sgl_jax.text.tool_calls.schemas import Schema


class Reading(NamedTuple):
    """Work of a parser of calls. It begins a call in the answer, or leaves it as it is: then the text is content."""

    source: Source
    answer: Answer
    tools: Mapping[str, Schema]  # parameters by name


def is_name(text: str) -> bool:
    """Return whether a tool may have this name. Others tell that a text is no call."""
    return bool(text) and not any(char.isspace() or char in "<>{}[]()\"'|" for char in text)
