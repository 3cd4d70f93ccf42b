"""Renders chat templates in a process of its own. A template is a program that the model's author wrote: it may run for
ever or fill the memory, and Python cannot end a thread.

A request and its answer are a line of JSON each. The process ends when its parent does, or closes the pipe, and by a
signal from the system in the middle of a template that computes for too long, even inside one operation.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable

from sgl_jax.text.chat_template import Arguments, ChatTemplate, TemplateError

_MEMORY_BYTES = 1 << 30


class TemplateProcess:
    """Starts the process with the first call, and anew after a template that computed for more than `seconds`."""

    def __init__(self, seconds: float = 3.0):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def render(self, template: ChatTemplate, max_characters: int, **conversation: object) -> str:
        """Do as `ChatTemplate.render` does, one call at a time, and cut the text behind so many characters. Raises
        TemplateError for too much time or memory, too."""
        request = [template.source, template.special_tokens, max_characters, conversation]
        try:
            line = json.dumps(request).encode() + b"\n"
        except RecursionError as error:
            raise TemplateError("the messages or chat_template_kwargs are nested too deeply") from error
        text, refusal = json.loads(self._answer(line))
        if refusal is not None:
            raise TemplateError(refusal)
        return text

    def _answer(self, line: bytes) -> bytes:
        if self._process is None:
            command = [sys.executable, "-m", "sgl_jax.text.template_process", str(self._seconds)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._end = weakref.finalize(self, _end, self._process)
        process, answer = self._process, b""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # a broken pipe: the process has ended
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer.endswith(b"\n"):
            return answer
        self.close()
        if process.returncode == -signal.SIGPROF:
            raise TemplateError(f"the chat template was stopped after {self._seconds:g} s with these messages")
        raise TemplateError("the chat template ended the process that renders it with these messages")

    def close(self) -> None:
        self._process = None
        self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError), process:  # closes the pipes; what was not written is of no use
        pass


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all processes; the parent acts on them
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent that ignores it would leave that to its children
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    bound = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))
    compiled: dict[str, ChatTemplate] = {}
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # counts the seconds that this process computes
        answer = _rendered(line, compiled)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _rendered(line: bytes, compiled: dict[str, ChatTemplate]) -> tuple[str | None, str | None]:
    """Return the text, or why there is none."""
    try:
        source, special_tokens, max_characters, conversation = json.loads(line)
        for call in [call for message in conversation["messages"] for call in message.get("tool_calls", ())]:
            call["function"]["arguments"] = Arguments(call["function"]["arguments"])
        template = compiled.setdefault(source, ChatTemplate(source, special_tokens))
        return template.render(**conversation)[:max_characters], None
    except (TemplateError, MemoryError, RecursionError) as error:
        return None, str(error) or type(error).__name__


if __name__ == "__main__":
    main()
