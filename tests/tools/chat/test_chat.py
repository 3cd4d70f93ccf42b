"""The chat of a terminal: in a pipe, in a terminal with Ctrl-C, its commands, its key, and servers that do not answer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.fake_core import FakeCore
from messages import says
from server.live_server import MODEL, LiveServer
from sgl_jax.tools.chat import peers
from sgl_jax.tools.chat.chat_command import main
from sgl_jax.tools.chat.conversation import CommandError, Conversation

SERVER = Path(__file__).parents[2] / "server"
THOUGHTFUL = "<think>a thought</think>an answer"


def repeating(step_seconds: float) -> LiveServer:
    """Make a server of a model whose answer is the last message."""
    template = str(SERVER / "tool_template.jinja")
    return LiveServer(lambda: FakeCore(step_seconds=step_seconds), chat_template=template, reasoning_parser="qwen3")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with repeating(0.002) as live:
        yield live


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGL_JAX_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def lines(text: str) -> list[str]:
    """Split an output; the tokenizer puts a space before an answer."""
    return [line.strip() for line in text.splitlines()]


class Terminal:
    """The program in a terminal of its own, with what it wrote so far."""

    def __init__(self, url: str):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "sgl_jax", "chat", "--url", url]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.written = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def see(self, text: str, waiting: Callable[[], object] = lambda: None) -> None:
        """Wait until the program has written the text, and forget what came up to its end. `waiting` is called each second."""
        end = time.monotonic() + 30
        while text not in self.written:
            assert time.monotonic() < end, self.written
            if select.select([self._ours], [], [], 1)[0]:
                self.written += os.read(self._ours, 4096).decode()
            else:
                waiting()
        self.written = self.written.partition(text)[2]

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextlib.contextmanager
def opened(server: LiveServer) -> Iterator[Terminal]:
    terminal = Terminal(server.url)
    with contextlib.closing(terminal):
        terminal.see("> ")
        yield terminal


@pytest.fixture
def terminal(server: LiveServer) -> Iterator[Terminal]:
    with opened(server) as terminal:
        yield terminal


def test_a_pipe_has_a_question_a_line_and_plain_answers(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "chat.json"
    commands = "/system be brief", "/set temperature 0.0"
    pipe(
        monkeypatch, *commands, THOUGHTFUL, "", "two", "/regenerate", f"/save {saved}", " /a question", "/exit", "never"
    )
    assert main(["--url", f"{server.url}/v1"]) == 0
    assert lines(capsys.readouterr().out) == ["an answer", "two", "two", "/a question"]
    said = (
        ("system", "be brief"),
        ("user", THOUGHTFUL),
        ("assistant", "an answer"),
        ("user", "two"),
        ("assistant", "two"),
    )
    messages = [{"role": role, "content": content} for role, content in said]
    body = json.loads(saved.read_text())
    found = [{**each, "content": each["content"].strip()} for each in body["messages"]]
    assert (found, body["temperature"]) == (messages, 0.0)


def test_three_quotes_hold_a_text_of_several_lines(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, '"""', "/one", "two", '"""', "three")
    assert main(["--url", server.url]) == 0
    assert lines(capsys.readouterr().out) == ["/one", "two", "three"]


def test_a_pipe_ends_at_what_the_server_refuses(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "/set temperature hot", "one", "two")
    assert main(["--url", server.url]) == 1
    out, errors = capsys.readouterr()
    assert out.strip() == ""
    assert says(errors, "chat: error: HTTP 400 … temperature")


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    with repeating(0.1) as server, opened(server) as terminal:
        stop_an_answer(terminal, server, tmp_path)


def stop_an_answer(terminal: Terminal, server: LiveServer, tmp_path: Path) -> None:
    saved, question = tmp_path / "chat.json", "word " * 80
    terminal.type(f"{question}\n")
    terminal.see("word word word \r\n")  # the echo of what was typed
    terminal.see("word word ")
    terminal.interrupt()
    terminal.see("> ")
    terminal.type(f"/save {saved}\n")
    terminal.see("wrote")
    terminal.see("> ")
    asked, answered = json.loads(saved.read_text())["messages"]
    assert question.startswith(answered["content"].strip())
    assert len(answered["content"]) < len(asked["content"])
    for _ in range(200):  # the server sees the closed connection a little later
        if server.service.num_live == 0:
            break
        time.sleep(0.05)
    assert server.service.num_live == 0
    terminal.interrupt()  # at the prompt, too, where a signal is lost between the prompt and the wait for a key
    terminal.see("> ", waiting=terminal.interrupt)
    terminal.type("still here\n")
    terminal.see("still here\r\n still here\r\n")
    terminal.see("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_a_terminal_has_dim_thoughts_and_mistakes_end_nothing(terminal: Terminal) -> None:
    terminal.type("/sett x\n")
    terminal.see("/sett is not a command, did you mean /set?")
    terminal.type(f"{THOUGHTFUL}\x1b[0m\n")
    terminal.see("an answer")
    terminal.see("\x1b[2m")
    terminal.see("an answer")


def test_a_key_is_needed_and_comes_from_the_flag_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(api_key="right") as live:
        pipe(monkeypatch, "/set max_tokens 4", "one")
        assert main(["--url", live.url]) == 1
        assert says(capsys.readouterr().err, "HTTP 401 … --api-key … SGL_JAX_API_KEY")
        assert main(["--url", live.url, "--api-key", "right"]) == 0
        pipe(monkeypatch, "one")
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        monkeypatch.setenv("SGL_JAX_API_KEY", "right")
        assert main(["--url", live.url]) == 0


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    pipe(monkeypatch, "one")
    assert main(["--url", url]) == 1
    assert says(capsys.readouterr().err, f"chat: error: no server answers at {url}: Connection refused")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "localhost:30000"], "--url … localhost:30000 … http://"),
        (["--url", "http://a", "--model-path", "m"], "--model-path … leave it or --url out"),
        (["--api-key", "k", "--model-path", "m"], "--model-path … leave it or --api-key out"),
        (["--model-path", "m", "--page-size", "48"], "--page-size … 48 … power of two"),
        (["--temperature", "0"], "--temperature is not a flag"),
    ],
)
def test_mistakes_in_the_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert says(capsys.readouterr().err, message)


def test_an_engine_answers_in_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict] = []

    class StandIn:
        def __init__(self, **options: object):
            assert options == {"model_path": MODEL, "page_size": 16, "log_level": "warning"}

        def chat(self, messages: list[dict], **fields: object) -> Iterator[dict]:
            asked.append(fields)
            yield {"choices": [{"delta": {"content": messages[-1]["content"].upper()}}]}
            yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}

        def shutdown(self) -> None:
            asked.append({})

    monkeypatch.setattr("sgl_jax.server.chat_engine.ChatEngine", StandIn)
    monkeypatch.setattr(peers.log, "setup", lambda level: None)
    pipe(monkeypatch, "/set top_p 0.5", "one")
    assert main(["--model-path", MODEL, "--page-size", "16"]) == 0
    assert capsys.readouterr().out == "ONE\n"
    assert asked == [{"stream": True, "top_p": 0.5}, {}]


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("set", "model other", "model … --model-name"),
        ("set", "n 2", "n cannot be set … one answer"),
        ("save", "", "/save needs"),
        ("save", "/nowhere/at/all", "/nowhere/at/all cannot be written"),
        ("reset", "all", "/reset … 'all'"),
        ("foo", "", "/foo … /help"),
    ],
)
def test_commands_that_are_refused(command: str, text: str, message: str) -> None:
    with pytest.raises(CommandError) as error:
        Conversation().obey(command, text)
    assert says(str(error.value), message)


def test_settings_and_the_conversation_can_be_taken_back() -> None:
    conversation = Conversation()
    for command, text in (
        ("set", "stop ### end"),
        ("set", "top_k 3"),
        ("set", "top_k"),
        ("system", "a"),
        ("system", ""),
    ):
        conversation.obey(command, text)
    conversation.ask("one")
    assert conversation.body() == {"messages": [{"role": "user", "content": "one"}], "stop": "### end"}
    assert conversation.obey("set", "") == 'stop "### end"'
    conversation.obey("reset", "")
    with pytest.raises(CommandError):
        conversation.ask_again("")


def test_a_text_without_its_end_is_told(monkeypatch: pytest.MonkeyPatch, capsys, server: LiveServer) -> None:
    pipe(monkeypatch, '"""one', "two")
    assert main(["--url", server.url]) == 1
    assert says(capsys.readouterr().err, 'began with """ … no """ at its end')


@pytest.mark.parametrize("command", ["/exit", "/regenerate", "/reset"])
def test_commands_without_an_argument_refuse_one(monkeypatch, capsys, server: LiveServer, command: str) -> None:
    pipe(monkeypatch, f"{command} now")
    assert main(["--url", server.url]) == 1
    assert says(capsys.readouterr().err, f"{command} takes nothing behind it; 'now'")
