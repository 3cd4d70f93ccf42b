"""Loop of a chat: a question or a command is read, and what answers it is shown as it comes."""

import contextlib
import sys
from contextlib import closing

from rich.console import Console

from sgl_jax.tools.chat.conversation import CommandError, Conversation
from sgl_jax.tools.chat.peers import ChatError, Peer

_QUOTES = '"""'
_NO_CONTROLS = dict.fromkeys(each for each in (*range(32), *range(127, 160)) if chr(each) not in "\n\t")


class ChatLoop:
    """Questions from the standard input, answers on the standard output. In a terminal there are prompts and notes, and
    mistakes and Ctrl-C end nothing."""

    def __init__(self, peer: Peer):
        self._peer, self._conversation = peer, Conversation()
        self._console = Console(highlight=False)
        self._interactive = sys.stdin.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() a history and keys to edit with

    def run(self) -> int:
        """Go on until the input ends. Returns the exit code: 1 if a question of a pipe got no answer."""
        self._note(f"{self._peer.model}: /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if line is None or line.rstrip() == "/exit":
                    return 0
                self._do(line)
            except (ChatError, CommandError) as error:
                print(f"chat: error: {str(error).translate(_NO_CONTROLS)}", file=sys.stderr, flush=True)
                if not self._interactive:
                    return 1
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("")

    def _read(self) -> str | None:
        """Return the next question or command, which may have several lines; None at the end of the input."""
        try:
            text = input("> " if self._interactive else "")
            if not text.startswith(_QUOTES):
                return text
        except EOFError:
            return None
        text = text.removeprefix(_QUOTES)
        try:
            while not text.rstrip().endswith(_QUOTES):
                text += "\n" + input("… " if self._interactive else "")
        except EOFError:
            raise CommandError(f"the text that began with {_QUOTES} has no {_QUOTES} at its end") from None
        return " " + text.rstrip().removesuffix(_QUOTES).strip("\n")  # a space: it is no command

    def _do(self, line: str) -> None:
        command, _, rest = line.rstrip().partition(" ")
        before = [*self._conversation.messages]
        if command == "/regenerate":
            self._conversation.ask_again(rest.strip())
            self._answer(before)
        elif command.startswith("/"):
            self._note(self._conversation.obey(command[1:], rest.strip()))
        elif line.strip():
            self._conversation.ask(line.strip())
            self._answer(before)

    def _answer(self, before: list[dict[str, str]]) -> None:
        """Show the answer to the last question, and keep it. If none comes, the messages are those `before` again."""
        said, reason = "", None
        try:
            with closing(self._peer.chunks(self._conversation.body())) as chunks:
                for chunk in chunks:
                    for choice in chunk.get("choices") or ():
                        delta, reason = choice.get("delta") or {}, choice.get("finish_reason") or reason
                        self._show(delta.get("reasoning_content") or delta.get("reasoning") or "", thought=True)
                        self._show(text := delta.get("content") or "")
                        said += text
        finally:
            if said or reason is not None:
                self._conversation.answered(said)
            else:
                self._conversation.messages = before
            self._console.out("")
        if reason != "stop":
            self._note(f"(finish_reason: {reason})")

    def _show(self, text: str, thought: bool = False) -> None:
        """Write a piece of an answer. A thought is dim, so it is left out where nothing can be."""
        if self._console.is_terminal:
            self._console.out(text.translate(_NO_CONTROLS), end="", style="dim" if thought else None)
        elif not thought:
            print(text, end="", flush=True)

    def _note(self, text: str) -> None:
        if self._interactive:
            self._console.out(text.translate(_NO_CONTROLS), style="dim")
