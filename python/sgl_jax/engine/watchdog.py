"""Watchdog of the API side: notices an engine that has work and gets nothing done, whatever holds it up."""

import asyncio
import logging
from collections.abc import Callable

from sgl_jax.engine.messages import Event, Stats, StepOutput

logger = logging.getLogger(__name__)


class Watchdog:
    """Counts the seconds for which the engine has had work and has finished no step. A compilation that a step waits for
    is work done: the engine goes on reporting it. Beats are counted, not time, so that a pause of this process is none
    of the engine's."""

    def __init__(self, soft_s: float = 0.0, hard_s: float = 0.0):
        """`soft_s`: seconds until the engine is not ready; `hard_s`: until it counts as hung. 0: never."""
        self._soft_s, self._hard_s = soft_s, hard_s
        self._beat_s = min([1.0, *(limit / 4 for limit in (soft_s, hard_s) if limit)])
        self._stalled_s = 0.0

    @property
    def problem(self) -> str:
        """Why no requests should be sent; empty: all is well."""
        if not self._soft_s or self._stalled_s < self._soft_s:
            return ""
        return f"the engine has finished no step for {self._stalled_s:.0f} s (--soft-watchdog-timeout {self._soft_s:g})"

    def see(self, event: Event, before: Stats) -> None:
        """Take in an event of the engine; `before`: its last report before that."""
        match event:
            case StepOutput(keys=[], finished=[], stats=Stats() as now):
                idle = now.num_running + now.num_waiting == 0
                if idle or now.num_compiling or now.steps > before.steps:
                    self._stalled_s = 0.0
            case _:
                self._stalled_s = 0.0

    async def run(self, has_work: Callable[[], bool], give_up: Callable[[str], None]) -> None:
        """Watch until the engine hangs, and then call `give_up` with the reason."""
        while not self._hard_s or self._stalled_s < self._hard_s:
            await asyncio.sleep(self._beat_s)
            said = self.problem
            self._stalled_s = self._stalled_s + self._beat_s if has_work() else 0.0
            if self.problem and not said:
                logger.warning("%s", self.problem)
        give_up(f"it has finished no step for {self._stalled_s:.0f} s (--watchdog-timeout {self._hard_s:g})")
