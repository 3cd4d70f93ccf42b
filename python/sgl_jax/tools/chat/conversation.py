"""Conversation of a terminal, and the commands that change it."""

import json
from collections.abc import Callable
from pathlib import Path

from sgl_jax.request import Json
from sgl_jax.settings.flag_parser import NOTHING, hint_about

HELP = """/system TEXT      the system message from now on; without TEXT there is none
/reset            forget the conversation; the system message and settings stay
/set NAME VALUE   a field of the requests, as /set temperature 0.7; without VALUE its default again, without NAME a list
/regenerate       answer the last question anew
/save FILE        write the conversation as the body of a request to /v1/chat/completions
/help             this list
/exit             leave, as Ctrl-D does
A line that begins with \"\"\" begins a text of several lines, up to one that ends with \"\"\".
Ctrl-C stops an answer. A question may begin with / behind a space."""

_NAMES = ("system", "reset", "set", "regenerate", "save", "help", "exit")
_OURS = {  # fields that cannot be set, and why
    "messages": "the conversation is that",
    "stream": "answers are always streamed",
    "model": "--model-name says it",
    "n": "a question has one answer here",
    "tools": "nothing here carries out calls",
}


class CommandError(Exception):
    """A command that cannot be carried out."""


class Conversation:
    """Messages so far, the system message, and the other fields of each request."""

    def __init__(self) -> None:
        self.system = ""
        self.messages: list[dict[str, str]] = []  # without the system message
        self.settings: dict[str, Json] = {}

    def body(self) -> dict[str, Json]:
        """Return the body of the next request, without its model."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, *self.messages], **self.settings}

    def ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        self.messages.append({"role": "assistant", "content": answer})

    def ask_again(self, text: str) -> None:
        """Forget the last answer. Raises CommandError if there is none, or for a text behind the command."""
        _nothing_behind("/regenerate", text)
        if not self.messages:
            raise CommandError("there is no answer to regenerate")
        self.messages.pop()

    def obey(self, command: str, text: str) -> str:
        """Carry out a command that needs no answer of a model, and return what to show. Raises CommandError."""
        does: dict[str, Callable[[str], str]] = {
            "system": self._set_system,
            "reset": self._reset,
            "set": self._set,
            "save": self._save,
            "help": lambda _: HELP,
            "exit": lambda text: _nothing_behind("/exit", text),
        }
        if command not in does:
            hint = hint_about(f"/{command}", {f"/{name}": f"/{name}" for name in _NAMES}, NOTHING)
            raise CommandError(f"/{command} is not a command{hint or '; /help lists them'}")
        return does[command](text)

    def _set_system(self, text: str) -> str:
        self.system = text
        return "the system message is set" if text else "there is no system message"

    def _reset(self, text: str) -> str:
        _nothing_behind("/reset", text)
        self.messages = []
        return "the conversation is forgotten"

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        if not name:
            return "\n".join(f"{name} {json.dumps(value)}" for name, value in self.settings.items()) or "nothing is set"
        if name in _OURS:
            raise CommandError(f"{name} cannot be set: {_OURS[name]}")
        if not value:
            self.settings.pop(name, None)
            return f"{name} has its default"
        try:
            self.settings[name] = json.loads(value)
        except ValueError:
            self.settings[name] = value
        return f"{name} is {json.dumps(self.settings[name])}"

    def _save(self, text: str) -> str:
        if not text:
            raise CommandError("/save needs the name of a file")
        path = Path(text).expanduser()
        try:
            path.write_text(json.dumps(self.body(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror}") from error
        return f"wrote {path.resolve()}"


def _nothing_behind(command: str, text: str) -> str:
    if text:
        raise CommandError(f"{command} takes nothing behind it; {text!r} is too much")
    return ""
