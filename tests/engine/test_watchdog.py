"""Watchdog: an engine that has work and gets nothing done is noticed, one that waits, compiles or works is not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
from test_inprocess import STORIES

from fakes.fake_core import FakeCore
from fakes.fake_engine import FakeEngine
from messages import says
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.engine.messages import CacheFlushed, Event, Finished, Stats, StepOutput
from sgl_jax.engine.watchdog import Watchdog
from sgl_jax.request import FinishReason

BEFORE = Stats(num_running=1, num_waiting=2, steps=7)


def reasons(event: Event | None, *, work: bool = True, soft_s: float = 0.0, beats: int = 12) -> tuple[str, list[str]]:
    """Return the problem, and the reasons to give up, of a watchdog that sees the event before each beat of 0.01 s."""
    watchdog, given_up = Watchdog(soft_s, 0.04), []

    def has_work() -> bool:
        nonlocal beats
        beats -= 1
        if event is not None:
            watchdog.see(event, BEFORE)
        if beats < 0:
            raise asyncio.CancelledError
        return work

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(watchdog.run(has_work, given_up.append))
    return watchdog.problem, given_up


@pytest.mark.parametrize(
    "event",
    [
        StepOutput(),
        StepOutput([1], [5]),
        StepOutput(finished=[Finished(1, FinishReason("abort"))]),
        StepOutput(stats=Stats(num_running=1, steps=8)),  # a chunk of a long prompt
        StepOutput(stats=Stats(num_waiting=1, steps=7, num_compiling=3)),
        StepOutput(stats=Stats(steps=7)),  # it has no requests, but a profile to write
        CacheFlushed(1, 0),
    ],
)
def test_an_engine_that_gets_something_done_does_not_hang(event: Event) -> None:
    assert reasons(event) == ("", [])


@pytest.mark.parametrize("event", [None, StepOutput(stats=BEFORE)])
def test_an_engine_that_finishes_no_step_hangs(event: Event | None) -> None:
    problem, [reason] = reasons(event, soft_s=0.02)
    assert says(problem, "--soft-watchdog-timeout 0.02")
    assert says(reason, "0 s … --watchdog-timeout 0.04")


def test_an_engine_without_work_does_not_hang() -> None:
    assert reasons(None, work=False, soft_s=0.02) == ("", [])


def test_0_is_never() -> None:
    assert Watchdog(0.0, 0.0).problem == ""
    watchdog = Watchdog(0.02, 0.0)

    async def watch() -> None:
        await asyncio.wait_for(watchdog.run(lambda: True, pytest.fail), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(watch())
    assert says(watchdog.problem, "--soft-watchdog-timeout 0.02")


def test_a_request_that_waits_for_its_program_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiles(FakeCore):
        reports = 30

        def step(self) -> list[Event]:
            if not self._rows or not self.reports:
                return super().step()
            self.reports -= 1
            time.sleep(0.02)
            return [StepOutput(stats=Stats(num_running=1, num_compiling=2))]

    monkeypatch.setattr("sgl_jax.engine.service.Watchdog", lambda: Watchdog(0.1, 0.3))
    with FakeEngine(Compiles, STORIES) as engine:
        assert engine.generate("Once")["text"] == " Once"


def test_calls_into_an_engine_of_this_process_end_when_its_thread_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    class Hangs(FakeCore):
        def step(self) -> list[Event]:
            if self._rows or self._kept:
                over.wait(60)
            return super().step()

    monkeypatch.setattr("sgl_jax.engine.service.Watchdog", lambda: Watchdog(0.0, 0.2))
    began = time.monotonic()
    for call in (lambda engine: engine.generate("a"), lambda engine: engine.flush_cache()):
        with FakeEngine(Hangs, STORIES) as engine, pytest.raises(EngineFailed, match=r"--watchdog-timeout 0\.2"):
            call(engine)
    assert time.monotonic() - began < 8  # nothing waits for the thread
    over.set()
