"""The launcher: instant help, one clear line for a bad flag, and the server's exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sgl_jax
from messages import says
from sgl_jax import launch_server
from sgl_jax.observability import log
from sgl_jax.settings.server_args import FLAGS, ServerArgs

HELP_SECONDS = 0.3  # processor time: other work on the machine does not count
HELP_MODULES = 190  # in sys.modules at the end of --help, Python's own among them


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerArgs]:
    """Stands in for the server: collects what it was started with and ends with exit code 7."""
    calls: list[ServerArgs] = []

    def serve(server_args: ServerArgs) -> int:
        calls.append(server_args)
        return 7

    lifecycle = types.ModuleType("sgl_jax.server.lifecycle")
    lifecycle.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_jax.server.lifecycle", lifecycle)
    monkeypatch.setattr(log, "setup", lambda level: None)
    return calls


def processor_seconds() -> float:
    """Used by child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_instant_grouped_and_complete() -> None:
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        result = run("-m", "sgl_jax.launch_server", "--help")
        seconds.append(processor_seconds() - start)
    assert result.returncode == 0
    for flag in FLAGS:
        assert all(option in result.stdout for option in flag.options)
        assert f"{flag.about.group}:" in result.stdout
    assert "SGL_JAX_PAGE_SIZE" in result.stdout
    assert min(seconds) < HELP_SECONDS


def test_help_imports_little() -> None:
    result = run(
        "-c",
        "import atexit, sys; from sgl_jax import launch_server;"
        "atexit.register(lambda: print(len(sys.modules), file=sys.stderr));"
        "launch_server.main(['--help'])",
    )
    assert result.returncode == 0
    assert int(result.stderr) <= HELP_MODULES


def test_parsing_imports_nothing_heavy() -> None:
    result = run(
        "-c",
        "import sys; import sgl_jax.launch_server; from sgl_jax.settings.server_args import ServerArgs;"
        "ServerArgs.from_cli(['--model-path', 'm'], {});"
        "print([name for name in ('jax', 'numpy', 'fastapi', 'uvicorn', 'zmq', 'yaml') if name in sys.modules])",
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("module", ["sgl_jax", "sgl_jax.launch_server"])
def test_a_bad_flag_is_one_line_on_stderr_and_exit_code_2(module: str) -> None:
    result = run("-m", module, "--model-path", "m", "--page-size", "48")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert says(result.stderr, "sgl_jax: error: --page-size … 48 … power of two … 1024")


def test_version() -> None:
    assert run("-m", "sgl_jax", "--version").stdout == f"sgl_jax {sgl_jax.__version__}\n"


def test_serves_with_the_parsed_args_and_returns_the_servers_exit_code(served: list[ServerArgs]) -> None:
    assert launch_server.main(["--model-path", ".", "--port", "1234"]) == 7
    assert [args.port for args in served] == [1234]


def test_a_draft_model_alone_is_launched_with_its_verifier(served: list[ServerArgs], tmp_path: Path) -> None:
    about = {"algorithm": "eagle3", "verifier": {"name_or_path": "org/target"}}
    (tmp_path / "config.json").write_text(json.dumps({"speculators_config": about}))
    assert launch_server.main(["--model-path", str(tmp_path)]) == 7
    [args] = served
    assert (args.model_path, args.speculative_draft_model_path) == ("org/target", str(tmp_path))


def test_what_has_no_effect_is_said_once(served: list[ServerArgs], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="sgl_jax")
    for _ in range(2):
        launch_server.main(["--model-path", ".", "--trust-remote-code"])
    assert len(served) == 2
    [said] = [r.getMessage() for r in caplog.records if "--trust-remote-code" in r.getMessage()]
    assert says(said, "no effect … never run")


@pytest.mark.parametrize("module", ["sgl_jax", "sgl_jax.launch_server"])
def test_ctrl_c_while_modules_are_imported_ends_quietly_with_130(module: str) -> None:
    """The first line comes before the imports."""
    command = [sys.executable, "-m", module, "--model-path", "m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert says(first, f"sgl_jax {sgl_jax.__version__}, starting")
    assert (process.returncode, out, errors) == (130, "", "")
