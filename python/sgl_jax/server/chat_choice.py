"""One choice of a chat completion on its way out: the parts of its answer as deltas, or as a whole message."""

import secrets
import string
from collections.abc import Container, Sequence

from sgl_jax.engine.generation import FinishType
from sgl_jax.request import Json
from sgl_jax.server.openai_stream import News
from sgl_jax.server.responses import AnsweredCall, AssistantMessage, CalledFunction, ChatFinish
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.scanner import AnswerFormat, AnswerScanner

type Delta = dict[str, Json]

_LETTERS = string.ascii_letters + string.digits


class ChoiceReader:
    """`form` None: the answer is text without thoughts or calls. Tokens that are `skipped` are not in the text."""

    def __init__(
        self,
        form: AnswerFormat | None,
        tokenizer: Tokenizer,
        skipped: Container[int],
        stream_thoughts: bool,
        with_thoughts: bool,
    ):
        self._scanner = None if form is None else AnswerScanner(form)
        self._counts_tokens = form is not None and form.thoughts is not None
        self._new_id = _mistral_id if form is not None and form.calls == "mistral" else _call_id
        self._tokenizer, self._skipped = tokenizer, skipped
        self._stream_thoughts, self._with_thoughts = stream_thoughts, with_thoughts
        self._thought = ""  # kept until it ends
        self._num_calls = 0
        self._ids: set[str] = set()
        self._offsets: list[int] = []  # where each token begins in the text
        self._length = 0

    def deltas(self, news: News) -> list[Delta]:
        """Return what the news adds to the message, in order."""
        found: list[Delta] = []
        for part in self.parts(news):
            if isinstance(part, Thought) and not self._stream_thoughts:
                self._thought += part.text
            else:
                found += [*self._whole_thought(), self._delta(part)]
        return found if news.finish is None else [*found, *self._whole_thought()]

    def _whole_thought(self) -> list[Delta]:
        """Return the thought that was kept until its end."""
        thought, self._thought = self._thought, ""
        return [{"reasoning_content": thought}] if thought else []

    def message(self, news: News) -> AssistantMessage:
        """Return the message of a choice of which all news came as one."""
        found = AssistantMessage("assistant", "")
        calls: list[AnsweredCall] = []
        thought = ""
        for part in self.parts(news):
            match part:
                case Text(text):
                    found.content = (found.content or "") + text
                case Thought(text):
                    thought += text
                case Call(name, id):
                    calls.append(AnsweredCall(self.call_id(id), "function", CalledFunction(name, "")))
                case Arguments(text):
                    calls[-1].function.arguments += text
        if thought:
            found.reasoning_content = thought
        if calls:
            found.content, found.tool_calls = found.content or None, calls
        return found

    def finish_reason(self, finish: FinishType | None) -> ChatFinish | None:
        called = self._scanner is not None and self._scanner.called
        return "tool_calls" if finish == "stop" and called else finish

    @property
    def num_thought_tokens(self) -> int:
        return self._scanner.count_thought(self._offsets) if self._scanner is not None and self._counts_tokens else 0

    def parts(self, news: News) -> list[Part]:
        """Return what the news adds to the answer."""
        if self._scanner is None:
            return [Text(news.text)] if news.text else []
        if self._counts_tokens:
            self._place(news.tokens)
        found = self._scanner.push(news.text) + ([] if news.finish is None else self._scanner.finish())
        return found if self._with_thoughts else [part for part in found if not isinstance(part, Thought)]

    def _place(self, tokens: Sequence[int]) -> None:
        """Note where the tokens begin in the text."""
        for token in tokens:
            self._offsets.append(self._length)
            if token not in self._skipped:
                self._length += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token))

    def _delta(self, part: Part) -> Delta:
        match part:
            case Text(text):
                return {"content": text}
            case Thought(text):
                return {"reasoning_content": text}
            case Call(name, id):
                self._num_calls += 1
                function = {"name": name, "arguments": ""}
                return self._call_delta({"id": self.call_id(id), "type": "function", "function": function})
            case Arguments(text):
                return self._call_delta({"function": {"arguments": text}})

    def call_id(self, given: str | None) -> str:
        """Return the model's own id for a call, or a new one where it has none or has used it."""
        found = given if given and given not in self._ids else self._new_id()
        self._ids.add(found)
        return found

    def _call_delta(self, call: Delta) -> Delta:
        return {"tool_calls": [{"index": self._num_calls - 1, **call}]}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    """Return an id of the form that Mistral's templates insist on."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
