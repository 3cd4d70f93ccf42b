"""The loop: commands in, steps, events out, and nothing when there is nothing."""

from __future__ import annotations

import contextlib
import queue
import threading

import pytest

from fakes.fake_core import FakeCore
from sgl_jax.engine.loop import one_line, run
from sgl_jax.engine.messages import (
    Abort,
    CacheFlushed,
    Command,
    EngineDied,
    Event,
    FlushCache,
    Generate,
    Ready,
    Shutdown,
    StepOutput,
)
from sgl_jax.request import SamplingParams


class Inbox:
    """Queue of commands that counts blocking calls."""

    def __init__(self) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.blocking_gets = 0

    def get(self, block: bool) -> Command | None:
        self.blocking_gets += block
        try:
            return self.commands.get(block, timeout=5)
        except queue.Empty:
            return None


class Outbox:
    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.send = self.events.put

    def next(self) -> Event:
        return self.events.get(timeout=5)


class Loop:
    def __init__(self, core: FakeCore):
        self.inbox, self.outbox = Inbox(), Outbox()
        self.steps = 0
        step = core.step

        def counted() -> list[Event]:
            self.steps += 1
            return step()

        core.step = counted
        self.thread = threading.Thread(target=run, args=(core, self.inbox.get, self.outbox.send))

    def __enter__(self) -> Loop:
        self.thread.start()
        assert isinstance(self.outbox.next(), Ready)
        return self

    def __exit__(self, *_: object) -> None:
        self.inbox.commands.put(Shutdown())
        self.thread.join(5)
        assert not self.thread.is_alive()


def test_a_request_runs_to_its_end_and_then_the_loop_sleeps() -> None:
    with Loop(FakeCore()) as loop:
        loop.inbox.commands.put(Generate(1, [5, 6], SamplingParams()))
        outputs = [loop.outbox.next() for _ in range(3)]
        assert [output.tokens for output in outputs if isinstance(output, StepOutput)] == [[5], [6], [2]]
        steps, gets = loop.steps, loop.inbox.blocking_gets
        threading.Event().wait(0.2)
        assert (loop.steps, loop.inbox.blocking_gets) == (steps, gets)


def test_commands_are_taken_while_requests_run() -> None:
    with Loop(FakeCore(step_seconds=0.01)) as loop:
        loop.inbox.commands.put(Generate(1, [5], SamplingParams(ignore_eos=True)))
        loop.outbox.next()
        loop.inbox.commands.put(Abort([1, 99]))
        while not (event := loop.outbox.next()).finished:
            pass
        assert [(finished.key, finished.reason.type) for finished in event.finished] == [(1, "abort")]


def test_answers_of_an_idle_engine_come_at_once() -> None:
    with Loop(FakeCore()) as loop:
        loop.inbox.commands.put(FlushCache(7))
        assert loop.outbox.next() == CacheFlushed(7, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_is_the_last_event_and_is_raised() -> None:
    class Broken(FakeCore):
        def step(self) -> list[Event]:
            raise RuntimeError("no more memory\nwith details")

    outbox, inbox = Outbox(), Inbox()
    inbox.commands.put(Generate(1, [5], SamplingParams()))
    with pytest.raises(RuntimeError):
        run(Broken(), inbox.get, outbox.send)
    assert isinstance(outbox.next(), Ready)
    assert outbox.next() == EngineDied("RuntimeError: no more memory")


def test_the_core_is_closed_after_a_shutdown_and_after_an_error() -> None:
    closed = []

    class Closing(FakeCore):
        def close(self, reason: str = "") -> None:
            closed.append(reason)

        def step(self) -> list[Event]:
            raise RuntimeError("no more memory")

    for command in (Shutdown(), Generate(1, [5], SamplingParams())):
        inbox = Inbox()
        inbox.commands.put(command)
        with contextlib.suppress(RuntimeError):
            run(Closing(), inbox.get, Outbox().send)
    assert closed == ["", "RuntimeError: no more memory"]


def test_errors_in_one_line() -> None:
    assert one_line(ValueError("too big\nfor this")) == "too big"
    assert one_line(KeyError("a")) == "KeyError: 'a'"
    assert one_line(RuntimeError()) == "RuntimeError"
