"""Reads one answer, whole or in pieces: how it was cut makes no difference to what is found."""

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from sgl_jax.text.tool_calls.answer import Answer, Part
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, THOUGHTS, CallFormat, ThoughtFormat, around_calls
from sgl_jax.text.tool_calls.harmony import harmony
from sgl_jax.text.tool_calls.pieces import Source, Waiting
from sgl_jax.text.tool_calls.reading import Reading
from sgl_jax.text.tool_calls.schemas import Schema, types_of

type ThoughtState = Literal["open", "closed", "unopened"]


class AnswerFormat(NamedTuple):
    """How an answer is read."""

    calls: str | None  # name of a format; None: there are none
    thoughts: str | None
    thought: ThoughtState = "unopened"  # at the end of the prompt
    tools: Mapping[str, Schema] = {}  # parameters by name
    show_thoughts: bool = False  # leave them in the content, with their markers
    one_call: bool = False  # leave out further ones


class AnswerScanner:
    def __init__(self, form: AnswerFormat):
        self._form = form
        self._source = Source(around_calls(form.calls, form.thoughts))
        self._answer = Answer(form.one_call)
        self._reader = self._read()
        next(self._reader)

    @property
    def called(self) -> bool:
        """Whether the answer has calls, and the last of them is whole."""
        return self._answer.called

    def push(self, text: str) -> list[Part]:
        """Return what the text adds to the answer."""
        self._source.feed(text)
        next(self._reader)
        return self._answer.take()

    def finish(self) -> list[Part]:
        """Return what was held back, when no more text comes."""
        self._source.ended = True
        for _ in self._reader:
            pass
        self._answer.finish()
        return self._answer.take()

    def count_thought(self, offsets: Sequence[int]) -> int:
        """Count the tokens of thoughts, without markers. `offsets` has where each token begins in the text."""
        counts = (
            bisect.bisect_left(offsets, self._source.position if end is None else end)
            - bisect.bisect_left(offsets, start)
            for start, end in self._answer.thoughts
        )
        return sum(counts)

    def _read(self) -> Waiting[None]:
        yield
        form, source, answer = self._form, self._source, self._answer
        types = functools.cache(lambda tool, name: types_of(form.tools.get(tool, {}), name))
        reading = Reading(source, answer, form.tools, types)
        if HARMONY in (form.calls, form.thoughts):
            yield from harmony(reading, form.show_thoughts or form.thoughts is None)
            return
        if form.thoughts is not None and form.thought != "closed":
            yield from _thought(reading, THOUGHTS[form.thoughts], form)
        if form.calls is not None:
            yield from _calls(reading, CALLS[form.calls])
        else:
            yield from source.until((), answer.text)


def _thought(reading: Reading, markers: ThoughtFormat, form: AnswerFormat) -> Waiting[None]:
    """Read a thought that the prompt or the answer opens. It is not searched for calls."""
    source, answer = reading.source, reading.answer
    opened = yield from source.take((markers.opener,))
    if not opened and form.thought != "open":
        return
    if form.show_thoughts:
        answer.text(opened)
        answer.text((yield from source.until((markers.closer,), answer.text)))
        answer.end_shown_thought()
        return
    answer.begin_thought(source.position)
    closer = yield from source.until((markers.closer,), answer.thought)
    if closer:
        answer.end_thought(source.position - len(closer))


def _calls(reading: Reading, form: CallFormat) -> Waiting[None]:
    """Read text and calls. An opener without a call behind it is text."""
    source, answer = reading.source, reading.answer
    while opener := (yield from source.until(form.openers, answer.text)):
        before, behind = answer.num_calls, source.keep()
        yield from form.read(reading, opener)
        if answer.num_calls == before:
            answer.text(opener + source.retry(behind))
        else:
            while form.closers and (yield from source.take(form.closers)):
                pass
        source.release()


def thought_state(prompt: str, thoughts: str | None, continues: bool = False) -> ThoughtState:
    """Return whether the end of a prompt leaves a thought open, has closed one, or leaves that to the answer. One that
    `continues` ends inside a message, in whose thought or behind it."""
    if thoughts is None or thoughts == HARMONY:
        return "unopened"
    opener, closer = THOUGHTS[thoughts]
    if continues:
        return "open" if prompt.rfind(opener) > prompt.rfind(closer) else "closed"
    end = prompt[-len(opener) - len(closer) - 16 :].rstrip()
    return "open" if end.endswith(opener) else "closed" if end.endswith(closer) else "unopened"
