"""The real server process with a fake engine in its own process: starting, draining, dying."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from live_server import MODEL, TEMPLATE

from messages import says
from sgl_jax.observability.log import READY
from sgl_jax.server.lifecycle import serve
from sgl_jax.settings.server_args import ServerArgs

HERE = Path(__file__).parent
PATIENCE_S = 60  # for what comes at once on a quiet machine


class Server:
    def __init__(self, factory: str, *flags: str, **environment: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(HERE / "fake_launcher.py"), factory, "--model-path", MODEL]
        command += ["--port", str(self.port), "--chat-template", str(TEMPLATE), *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))} | environment,
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if READY in line:
                return
        raise AssertionError(self.process.stderr.read())

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(
            int(pid) for pid in children if "sgl_jax.engine.process" in Path(f"/proc/{pid}/cmdline").read_text()
        )

    def long_request(self, tokens: int = 40) -> tuple[threading.Thread, list[httpx.Response]]:
        """Start a request in a thread, and return when the engine works on it."""
        answers: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}

        def ask() -> None:
            answers.append(httpx.post(f"{self.url}/generate", json=body, timeout=PATIENCE_S))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: "sgl_jax_num_requests_running 1.0" in httpx.get(f"{self.url}/metrics").text)
        assert not answers
        return thread, answers

    def wait_draining(self) -> None:
        wait_until(lambda: httpx.get(f"{self.url}/ready").status_code == 503)


@contextmanager
def running(factory: str, *flags: str, **environment: str) -> Iterator[Server]:
    server = Server(factory, *flags, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_serves_from_an_engine_process_and_ends_cleanly_on_sigterm() -> None:
    with running("quick") as server:
        server.wait_ready()
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert httpx.post(f"{server.url}/generate", json={"text": "Once upon"}).json()["text"] == " Once upon"
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        wait_until(lambda: has_ended(engine))


def test_sigterm_drains_and_refuses_new_requests() -> None:
    with running("slow") as server:
        server.wait_ready()
        thread, answers = server.long_request()
        os.kill(server.engine_pid(), signal.SIGTERM)  # a container may signal the engine too, which ignores it
        server.process.send_signal(signal.SIGTERM)
        server.wait_draining()
        refused = httpx.post(f"{server.url}/generate", json={"text": "a"})
        assert refused.status_code == 503
        thread.join(PATIENCE_S)
        assert answers[0].json()["meta_info"]["completion_tokens"] == 40
        assert server.process.wait(PATIENCE_S) == 0


def test_a_drain_that_takes_too_long_is_cut() -> None:
    with running("slow", "--shutdown-timeout-s", "0.3") as server:
        server.wait_ready()
        thread, answers = server.long_request(tokens=400)
        server.process.send_signal(signal.SIGTERM)
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 503
        assert server.process.wait(PATIENCE_S) == 1


def test_sigterm_with_a_hung_engine_is_no_clean_end() -> None:
    with running("slow", "--shutdown-timeout-s", "0.3") as server:
        server.wait_ready()
        thread, answers = server.long_request(tokens=400)
        os.kill(server.engine_pid(), signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 503
        assert server.process.wait(PATIENCE_S) == 1


def test_a_second_signal_stops_at_once() -> None:
    with running("slow") as server:
        server.wait_ready()
        thread, answers = server.long_request(tokens=400)
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGINT)
        server.wait_draining()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) != 0
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 503
        wait_until(lambda: has_ended(engine))


def test_when_the_engine_is_killed_clients_get_an_error_and_the_server_ends() -> None:
    with running("slow") as server:
        server.wait_ready()
        thread, answers = server.long_request(tokens=400)
        os.kill(server.engine_pid(), signal.SIGKILL)
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 500
        assert "signal 9" in answers[0].json()["error"]["message"]
        assert server.process.wait(PATIENCE_S) != 0


def test_when_the_engine_fails_its_reason_reaches_the_client() -> None:
    with running("failing_when_running", "--skip-server-warmup") as server:
        server.wait_ready()
        body = {"text": "a", "sampling_params": {"ignore_eos": True}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 500
        assert "the device is lost" in answer.json()["error"]["message"]
        assert server.process.wait(PATIENCE_S) != 0


@pytest.mark.parametrize("factory", ["slow", "hanging"])
def test_an_engine_that_hangs_is_not_ready_and_then_ends_the_server(factory: str) -> None:
    """The engine is stopped from outside, or its thread never returns. Clients are answered, and the log has the reason."""
    with running(
        factory, "--soft-watchdog-timeout", "0.5", "--watchdog-timeout", "5", "--skip-server-warmup"
    ) as server:
        server.wait_ready()
        thread, answers = server.long_request(tokens=400)
        engine = server.engine_pid()
        if factory == "slow":
            os.kill(engine, signal.SIGSTOP)
            server.wait_draining()
            os.kill(engine, signal.SIGCONT)
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
            os.kill(engine, signal.SIGSTOP)
        server.wait_draining()
        said = httpx.get(f"{server.url}/ready").json()["error"]["message"]
        assert says(said, "no step … --soft-watchdog-timeout 0.5")
        assert httpx.get(f"{server.url}/health").status_code == 200  # it ends by itself, with the reason
        assert server.process.wait(PATIENCE_S) == 1
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 500
        reason = "no step for 5 s … --watchdog-timeout 5 … 1 requests"
        assert says(answers[0].json()["error"]["message"], reason)
        assert server.process.stderr is not None
        assert says(server.process.stderr.read(), f"sgl_jax: error: … {reason}")
        assert has_ended(engine)


def test_when_the_server_is_killed_the_engine_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in the folder of temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running("quick") as server:
        server.wait_ready()
        assert len(list(tmp_path.iterdir())) == 1
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: has_ended(engine))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factory", ["failing_at_start"])
def test_an_engine_that_cannot_start_says_why_in_one_line(factory: str) -> None:
    with running(factory) as server:
        out, errors = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode != 0
        assert READY not in out
        lines = [line for line in errors.splitlines() if line and "Listening on" not in line]
        assert lines == [
            "sgl_jax: error: the weights do not fit: 10 GiB are needed, 8 GiB are there; choose a smaller model"
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_the_engine_loads_the_server_answers_and_can_be_stopped(number: signal.Signals) -> None:
    with running("never_ready") as server:

        def answers() -> bool:
            try:
                return httpx.get(f"{server.url}/health").status_code == 200
            except httpx.TransportError:  # it binds at once and answers a moment later
                return False

        wait_until(answers)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.post(f"{server.url}/generate", json={"text": "a"}).status_code == 503
        engine = server.engine_pid()
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE_S) == 128 + number
        wait_until(lambda: has_ended(engine))


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with running("quick", "--tokenizer-path", str(tmp_path)) as server:
        _, errors = server.process.communicate(timeout=PATIENCE_S)
        assert server.process.returncode != 0
        assert len(errors.strip().splitlines()) == 1
        assert "--tokenizer-path" in errors


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running("quick", "--port", port) as server:
            _, errors = server.process.communicate(timeout=PATIENCE_S)
            assert server.process.returncode != 0
            assert len(errors.strip().splitlines()) == 1
            assert f"127.0.0.1:{port}" in errors


def test_an_address_of_another_machine_is_one_line_about_the_host() -> None:
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with running("quick", "--host", host) as server:
            _, errors = server.process.communicate(timeout=PATIENCE_S)
            assert server.process.returncode != 0
            [line] = [line for line in errors.splitlines() if "error" in line]
            assert says(line, f"{host} … --host")
            assert "--port" not in line


def test_no_folder_for_temporary_files_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert serve(ServerArgs(model_path=MODEL, port=0)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert says(line, "sgl_jax: error: … No such file or directory … TMPDIR")


def test_a_server_without_a_key_says_who_can_use_it() -> None:
    with running("never_ready", "--host", "0.0.0.0", SGL_JAX_API_KEY="") as server:
        assert server.process.stderr is not None
        risks = [next(server.process.stderr) for _ in range(2)]
    assert says(risks[0], "WARNING: SGL_JAX_API_KEY is empty … no key")
    assert says(risks[1], "WARNING: --host is 0.0.0.0 … --api-key")


def test_it_is_idle_when_idle() -> None:
    with running("quick") as server:
        server.wait_ready()
        time.sleep(0.3)

        def ticks() -> int:
            total = 0
            for pid in (server.process.pid, server.engine_pid()):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
            return total

        before = ticks()
        time.sleep(1.5)
        assert (ticks() - before) / os.sysconf("SC_CLK_TCK") / 1.5 < 0.02
