"""From arguments to a core: weights are read and programs compiled at the same time."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sgl_jax.engine import startup
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.server_args import ServerArgs


def arguments(model: Path, cache: Path) -> ServerArgs:
    return ServerArgs(
        model_path=str(model), dtype="float32", device="cpu", compilation_cache_dir=str(cache), max_total_tokens=1024,
        max_running_requests=1, chunked_prefill_size=8,
    )  # fmt: skip


def test_programs_compile_while_the_weights_are_read(stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    load = startup._load

    def waits(*args):
        assert compiled.wait(60), "nothing was compiled before the weights were read"
        return load(*args)

    monkeypatch.setattr(startup, "_report_compile", lambda *report: compiled.set())
    monkeypatch.setattr(startup, "_load", waits)
    core = startup.build_core(arguments(stories260k, tmp_path))
    assert core.info.num_programs == len(core.runner.programs)
    core.close()


def test_weights_that_cannot_be_read_end_the_launch_at_once(
    stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiling thread is not waited for: its programs may take minutes."""
    over, ended = threading.Event(), threading.Event()

    def compiles(runner, report, stopped):
        over.wait(60)
        assert stopped.wait(60)
        ended.set()

    def fails(*args):
        raise ValueError("a tensor is missing")

    monkeypatch.setattr(ModelRunner, "compile", compiles)
    monkeypatch.setattr(startup, "_load", fails)
    began = time.monotonic()
    with pytest.raises(ValueError, match="a tensor is missing"):
        startup.build_core(arguments(stories260k, tmp_path))
    assert time.monotonic() - began < 50
    over.set()
    assert ended.wait(60)


def test_a_program_that_cannot_be_compiled_ends_the_reading_of_weights(
    stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(runner, report, stopped):
        raise ValueError("the backend cannot do sinks")

    def load_weights(*args, report, **options):
        for step in range(600):
            report(step / 600, step)
            time.sleep(0.1)
        pytest.fail("all weights were read")

    monkeypatch.setattr(ModelRunner, "compile", compiles)
    monkeypatch.setattr(startup, "load_weights", load_weights)
    with pytest.raises(ValueError, match="cannot do sinks"):
        startup.build_core(arguments(stories260k, tmp_path))
