"""Threads that compile grammars: their time, their number, and that the end of a process does not wait for them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from sgl_jax.constrained import compile_threads as module
from sgl_jax.constrained.compile_threads import GrammarCompiler
from sgl_jax.request import Grammar

LATE = 20.0  # seconds that no wait here takes


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LATE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Gate that "slow" grammars wait for."""
    gate = threading.Event()

    def compile_it(vocabulary: object, grammar: Grammar) -> str:
        if grammar.text == "slow":
            gate.wait(LATE)
        return grammar.text

    monkeypatch.setattr(module, "compile_grammar", compile_it)
    return gate


def test_time_counts_from_the_beginning_and_work_that_is_given_up_holds_up_no_other(gate: threading.Event) -> None:
    compiler = GrammarCompiler(lambda: None)  # type: ignore[arg-type]
    compiler.wait()
    slow = [compiler.compile(Grammar("regex", "slow")) for _ in range(2)]
    queued = compiler.compile(Grammar("regex", "quick"))
    until(lambda: min(each.seconds for each in slow) > 0.01)
    assert (queued.seconds, queued.done()) == (0.0, False)
    slow[0].give_up()
    assert queued.result(LATE) == "quick"
    gate.set()
    assert [each.result(LATE) for each in slow] == ["slow"] * 2
    compiler.close()


def test_an_error_of_the_vocabulary_is_that_of_every_grammar() -> None:
    def load() -> None:
        raise ValueError("no token ends an answer")

    compiler = GrammarCompiler(load)  # type: ignore[arg-type]
    compiler.wait()
    with pytest.raises(ValueError, match="no token ends"):
        compiler.compile(Grammar("regex", "a")).result(LATE)
    compiler.close()


def test_the_end_of_a_process_waits_for_no_grammar() -> None:
    code = "import time; from sgl_jax.constrained.compile_threads import GrammarCompiler as C; C(lambda: time.sleep(600)).close()"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
