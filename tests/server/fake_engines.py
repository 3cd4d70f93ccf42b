"""Engine cores for servers in processes of their own, named by "fake_engines:function"."""

from __future__ import annotations

import time
from collections.abc import Callable

from fakes.fake_core import FakeCore
from sgl_jax.observability.progress import Tell
from sgl_jax.settings.server_args import ServerArgs

type Die = Callable[[str], None]


def quick(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    return FakeCore()


def slow(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    return FakeCore(step_seconds=0.05)


def failing_at_start(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    raise ValueError("the weights do not fit: 10 GiB are needed, 8 GiB are there; choose a smaller model")


class _FailsWhenRunning(FakeCore):
    def step(self):
        if self.busy and self._totals["steps"] >= 8:
            raise RuntimeError("the device is lost")
        return super().step()


class _Hangs(FakeCore):
    def step(self):
        if self._totals["steps"] == 8:
            time.sleep(600)
        return super().step()


def hanging(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    """A call to the device that never returns, in the ninth step."""
    return _Hangs(step_seconds=0.02)


def failing_when_running(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    return _FailsWhenRunning()


def never_ready(server_args: ServerArgs, die: Die, tell: Tell) -> FakeCore:
    time.sleep(600)
    return FakeCore()
