"""The form that an answer must have: a thought, then calls of functions or content, each as far as a grammar shall bind it."""

from typing import Any, Self

import msgspec

from sgl_jax.request import Grammar
from sgl_jax.text.tool_calls.scanner import ThoughtState


class CallableFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any]  # JSON schema of a call's arguments


class AnswerForm(msgspec.Struct, frozen=True, omit_defaults=True):
    """A grammar of kind `answer_form`, as JSON. Behind the thought an answer has calls, or content, or both if `content` is
    None, which any text is then; `must_call` leaves out content."""

    thoughts: str | None = None  # name of a format of thoughts (formats.THOUGHTS, HARMONY); None: the answer has none
    thought: ThoughtState = "unopened"  # at the end of the prompt
    max_thought_tokens: int | None = None  # markers do not count
    calls: str | None = None  # name of a format of calls (formats.CALLS, HARMONY)
    functions: tuple[CallableFunction, ...] = ()
    must_call: bool = False
    one_call: bool = False  # a second call is not possible
    content: Grammar | None = None  # binds the text behind the thought; its kind is one that a user may give

    @classmethod
    def read(cls, text: str) -> Self:
        return msgspec.json.decode(text, type=cls)

    def grammar(self) -> Grammar:
        return Grammar("answer_form", msgspec.json.encode(self).decode())
