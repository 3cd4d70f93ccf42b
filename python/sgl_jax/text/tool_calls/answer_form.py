"""The form that an answer must have: a thought, then calls of functions or content, each as far as a grammar shall bind it."""

import dataclasses
import json
from typing import Self

from sgl_jax.request import Grammar, Json
from sgl_jax.text.tool_calls.scanner import ThoughtState


@dataclasses.dataclass(frozen=True)
class CallableFunction:
    name: str
    arguments: dict[str, Json]  # JSON schema of a call's arguments


@dataclasses.dataclass(frozen=True)
class AnswerForm:
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
        given = json.loads(text)
        form, functions, content = cls(**given), given["functions"], given["content"]
        return dataclasses.replace(
            form,
            functions=tuple(CallableFunction(**each) for each in functions),
            content=None if content is None else Grammar(*content),
        )

    def grammar(self) -> Grammar:
        """Return the form as a grammar. Raises RecursionError for schemas that are nested too deeply."""
        functions = [vars(each) for each in self.functions]
        return Grammar("answer_form", json.dumps({**vars(self), "functions": functions}, separators=(",", ":")))
