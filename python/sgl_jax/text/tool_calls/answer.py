"""Parts of an answer, and the rules of white space between them."""

from typing import NamedTuple


class Text(NamedTuple):
    text: str


class Thought(NamedTuple):
    text: str


class Call(NamedTuple):
    """Begin of a tool call. Its arguments follow, as JSON text in pieces."""

    name: str
    id: str | None  # the model's own


class Arguments(NamedTuple):
    text: str


type Part = Text | Thought | Call | Arguments


class Answer:
    """Collects the parts that a parser finds. White space around thoughts and before calls is dropped."""

    def __init__(self, one_call: bool = False):
        self.num_calls = 0
        self.fresh = True  # no text since the beginning, the thought or the last call
        self.thoughts: list[tuple[int, int | None]] = []  # where each begins and ends in the whole text
        self._parts: list[Part] = []
        self._pieces: list[str] = []  # text of the last part
        self._held = ""  # white space that nothing has followed yet
        self._strip = False  # drop white space until something else comes
        self._one_call = one_call
        self._muted = False  # calls after the only one are left out
        self._has_arguments = False
        self.called = False  # the last call is whole

    def take(self) -> list[Part]:
        """Return the parts found since the last call."""
        self._join()
        found, self._parts = self._parts, []
        return found

    @property
    def at_line_start(self) -> bool:
        return self.fresh or "\n" in self._held

    def text(self, text: str) -> None:
        self._write(Text, text)
        self.fresh = self.fresh and (not text or text.isspace())

    def end_shown_thought(self) -> None:
        """Let calls follow a thought that is part of the text as if they began the answer."""
        self.fresh = True

    def begin_thought(self, position: int) -> None:
        self._held, self._strip = "\n" if self.thoughts else "", True
        self.thoughts.append((position, None))

    def thought(self, text: str) -> None:
        self._write(Thought, text)

    def end_thought(self, position: int) -> None:
        self.thoughts[-1] = (self.thoughts[-1][0], position)
        self._held, self._strip, self.fresh = "", True, True

    def call(self, name: str, id: str | None = None) -> None:
        self._muted = self._one_call and self.num_calls > 0
        self._held, self._strip, self.fresh, self._has_arguments = "", False, True, False
        self.num_calls += 1
        if not self._muted:
            self._join()
            self._parts.append(Call(name, id))
            self.called = False

    def arguments(self, text: str) -> None:
        self._has_arguments = self._has_arguments or bool(text)
        self._add(Arguments, text)

    def end_call(self, whole: bool) -> None:
        """End the call. It is not `whole` where the answer ended first."""
        if whole and not self._has_arguments:
            self.arguments("{}")
        self.called = self.called or (whole and not self._muted)

    def finish(self) -> None:
        thinking = bool(self.thoughts) and self.thoughts[-1][1] is None
        if not (self.num_calls or self._strip or thinking):
            self._add(Text, self._held)

    def _write(self, kind: type[Text | Thought], text: str) -> None:
        text = text.lstrip() if self._strip else text
        if kept := text.rstrip():
            self._add(kind, self._held + kept)
            self._held, self._strip = "", False
        self._held += text[len(kept) :]

    def _add(self, kind: type[Text | Thought | Arguments], text: str) -> None:
        if not text or (self._muted and kind is Arguments):
            return
        if not self._pieces or not isinstance(self._parts[-1], kind):
            self._join()
            self._parts.append(kind(""))
        self._pieces.append(text)

    def _join(self) -> None:
        if self._pieces and not isinstance(last := self._parts[-1], Call):
            self._parts[-1] = last._replace(text="".join(self._pieces))
        self._pieces = []
