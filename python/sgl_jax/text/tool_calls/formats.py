"""The formats in which models write calls and thoughts, and which of them a chat template asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from sgl_jax.text.tool_calls import harmony, json_calls
from sgl_jax.text.tool_calls.gemma_calls import gemma
from sgl_jax.text.tool_calls.pieces import Waiting
from sgl_jax.text.tool_calls.python_calls import python_list
from sgl_jax.text.tool_calls.reading import Reading
from sgl_jax.text.tool_calls.sectioned_calls import deepseek, kimi
from sgl_jax.text.tool_calls.tagged_calls import CODER, DSML, GLM, tagged


class CallFormat(NamedTuple):
    """How calls stand in an answer. One begins with an opener, if `read` finds one there; closers may follow it."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    read: Callable[[Reading, str], Waiting[None]]  # is told the opener
    inside: tuple[str, ...] = ()  # other markers that a vocabulary may have as special tokens


class ThoughtFormat(NamedTuple):
    """Markers around a thought, which comes before the answer."""

    opener: str
    closer: str


HARMONY = "gpt_oss"  # reads the whole answer, calls and thoughts

_KIMI_SECTIONS = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_KIMI_ENDS = ("<|tool_call_end|>", "<|tool_calls_section_end|>", "<|tool_call_section_end|>")
_DEEPSEEK_ENDS = ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜end▁of▁sentence｜>")
_DSML_BLOCKS = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>")
_DSML_ENDS = ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>")

CALLS: Mapping[str, CallFormat] = {
    "hermes": CallFormat(("<tool_call>",), ("</tool_call>",), json_calls.marked),
    "qwen3_coder": CallFormat(("<tool_call>", "<function="), ("</tool_call>",), partial(tagged, CODER)),
    "glm45": CallFormat(
        ("<tool_call>",),
        ("</tool_call>",),
        partial(tagged, GLM),
        ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "llama3": CallFormat(("<|python_tag|>", "{", "["), (";", "<|eom_id|>", "<|eot_id|>"), json_calls.bare),
    "pythonic": CallFormat(("<|python_start|>", "[", "{"), ("<|python_end|>", ";"), python_list),
    "mistral": CallFormat(("[TOOL_CALLS]",), (), json_calls.mistral, ("[CALL_ID]", "[ARGS]")),
    "deepseek_v3": CallFormat(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"), _DEEPSEEK_ENDS, deepseek, ("<｜tool▁sep｜>",)
    ),
    "deepseek_v32": CallFormat((*_DSML_BLOCKS, '<｜DSML｜invoke name="'), _DSML_ENDS, partial(tagged, DSML)),
    "kimi_k2": CallFormat(
        (*_KIMI_SECTIONS, "<|tool_call_begin|>"), _KIMI_ENDS, kimi, ("<|tool_call_argument_begin|>",)
    ),
    "gemma4": CallFormat(("<|tool_call>",), ("<tool_call|>",), partial(gemma, '<|"|>'), ('<|"|>',)),
    "functiongemma": CallFormat(
        ("<start_function_call>",), ("<end_function_call>",), partial(gemma, "<escape>"), ("<escape>",)
    ),
}

THOUGHTS: Mapping[str, ThoughtFormat] = {
    "think": ThoughtFormat("<think>", "</think>"),
    "mistral": ThoughtFormat("[THINK]", "[/THINK]"),
    "gemma4": ThoughtFormat("<|channel>thought", "<channel|>"),
}

# Text by which templates of a format are known. The first that fits decides.
_CALLS_IN_TEMPLATE = (
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("｜DSML｜", "deepseek_v32"),
    ("<｜tool▁call▁begin｜>", "deepseek_v3"),
    ("<|channel|>", HARMONY),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call>", "gemma4"),
    ("<start_function_call>", "functiongemma"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(", "pythonic"),
    ("<tool_call>", "hermes"),
)
_THOUGHTS_IN_TEMPLATE = (
    ("<|channel|>", HARMONY),
    ("<|channel>", "gemma4"),
    ("[THINK]", "mistral"),
    ("</think>", "think"),
)


def takes_tools(template: str) -> bool:
    """Return whether a chat template shows the model the tools that it may call."""
    return "tools" in template


def calls_in(template: str) -> str:
    """Return the format in which a model with this chat template writes calls. The usual JSON is Llama's, too."""
    return next((name for mark, name in _CALLS_IN_TEMPLATE if mark in template), "llama3")


def thoughts_in(template: str) -> str | None:
    """Return the format in which a model with this chat template thinks. None: it does not."""
    return next((name for mark, name in _THOUGHTS_IN_TEMPLATE if mark in template), None)


def around_calls(calls: str | None, thoughts: str | None) -> tuple[str, ...]:
    """Return the markers that begin or end a call."""
    if HARMONY in (calls, thoughts):
        return harmony.MARKERS
    found = () if calls is None else (*CALLS[calls].openers, *CALLS[calls].closers)
    return tuple(marker for marker in found if len(marker) > 1)


def markers(calls: str | None, thoughts: str | None) -> tuple[str, ...]:
    """Return the markers of formats, for a detokeniser that leaves out other special tokens."""
    if HARMONY in (calls, thoughts):
        return harmony.MARKERS
    found = () if thoughts is None else tuple(THOUGHTS[thoughts])
    if calls is not None:
        form = CALLS[calls]
        found += (*form.openers, *form.closers, *form.inside)
    return tuple(marker for marker in found if len(marker) > 1)
