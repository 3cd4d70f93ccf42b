"""An event loop whose clock moves only when everything waits: timings are exact, and an hour passes at once.

Client and server share the loop and talk over real loopback sockets. When no socket is ready and nothing can run, the
clock jumps to the next timer; computing takes no time at all.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

_GRACE_S = 0.002  # real seconds without any event before the clock may jump: bytes on loopback arrive far sooner


class _JumpingSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        ready = super().select(_GRACE_S)
        if ready:
            return ready
        if timeout is None:
            return super().select(None)  # only another thread can wake the loop
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`loop.time()` starts at 0 and is exact up to float rounding."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_in_virtual_time[T](main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
