"""The verbs of `python -m sgl_jax` and `sgl-jax`: each reaches its module, the list is instant, mistakes have a hint."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import sgl_jax
from messages import says
from sgl_jax import compile, launch_server
from sgl_jax.__main__ import VERBS, main

HELP_SECONDS = 0.2  # processor time: other work on the machine does not count
PROJECT = Path(sgl_jax.__file__).parents[1] / "pyproject.toml"


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sgl-jax"])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[str], str]]:
    """Stands in for the launch of a server: collects its arguments and ends with exit code 7."""
    found: list[tuple[Sequence[str], str]] = []

    def launched(argv: Sequence[str], prog: str) -> int:
        found.append((argv, prog))
        return 7

    monkeypatch.setattr(launch_server, "main", launched)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_reaches_its_module_whose_usage_names_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sgl-jax {verb} ")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "chat"])
def test_the_module_of_a_verb_runs_by_itself_too(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = f"sgl_jax.{VERBS[verb].module}"
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {module} ")


def test_the_list_is_instant_and_has_every_verb_on_one_screen() -> None:
    seconds = []
    for flags in ((), ("--help",), ("-h",)):
        before = os.times()
        result = subprocess.run([sys.executable, "-m", "sgl_jax", *flags], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    lines = result.stdout.splitlines()
    assert lines[0] == "usage: python -m sgl_jax VERB [flags]"
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    assert all(any(line.startswith(f"  {verb} ") for line in lines) for verb in VERBS)
    assert min(seconds) <= HELP_SECONDS


def test_bench_lists_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  bench offline " in out
    assert "  serve " not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["srve"], "'srve' is not a verb, did you mean serve?"),
        (["launch-server"], "'launch-server' … did you mean serve?"),
        (["check_env"], "'check_env' … did you mean env?"),
        (["bench", "servin"], "'bench servin' … did you mean bench serving?"),
        (["xyzzy"], "'xyzzy' is not a verb; sgl-jax --help"),
        (["serve", "m", "--model-path", "m"], "given twice"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert says(capsys.readouterr().err, f"sgl_jax: error: … {message}")


def test_serve_takes_the_model_first_or_by_its_flag(launches: list[tuple[Sequence[str], str]]) -> None:
    flags = ["--model-path", "m", "--port", "1"]
    assert main(["serve", "m", "--port", "1"]) == main(["serve", *flags]) == main(flags) == 7
    assert launches == [(flags, "sgl-jax serve")] * 3


def test_plan_only_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "main", lambda argv, prog: 0 if "--plan" in argv and "--topology" in argv else 1)
    assert main(["plan", "--topology", "h100-1"]) == 0


def test_the_console_script_is_the_same_program() -> None:
    name, _, function = tomllib.loads(PROJECT.read_text())["project"]["scripts"]["sgl-jax"].partition(":")
    assert getattr(importlib.import_module(name), function) is main
