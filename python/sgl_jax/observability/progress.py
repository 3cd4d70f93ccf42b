"""Progress of a start, whose weights are read while its programs compile: a live view on a terminal, or log lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

from sgl_jax.engine.messages import Starting
from sgl_jax.observability.log import compile_line, programs_line, start_line, weights_line

_EVERY_S = 5.0  # between two lines about weights
_TELL_S = 0.25  # between two reports

type Tell = Callable[[Starting], None]


class LaunchProgress:
    """Says how far a start is, and tells it to `tell` in the thread that starts. `lines`: programs get a line each."""

    def __init__(self, logger: logging.Logger, num_programs: int, num_needed: int, tell: Tell, lines: bool = True):
        """`num_needed`: the programs that the start waits for, of `num_programs` in all."""
        self._logger, self._total, self._needed, self._tell, self.lines = logger, num_programs, num_needed, tell, lines
        self._started = self._said = time.perf_counter()
        self._told = -_TELL_S
        self._num_bytes = self._done = self._hits = 0
        self._weights = 0.0  # share that has been read

    def read(self, fraction: float, num_bytes: int) -> None:
        """Take in how much of the weights has been read."""
        self._num_bytes, self._weights = num_bytes, fraction
        if self.lines and (now := time.perf_counter()) - self._said >= _EVERY_S:
            self._said = now
            self._logger.info("loading weights %.0f%%", 100 * fraction)
        self._report()

    def all_read(self) -> None:
        self._weights = 1.0
        self._logger.info("%s", weights_line(self._num_bytes, self._seconds))

    def compiled(self, program: str, cache_hit: bool) -> None:
        """Take in that a program is ready, read from the cache or compiled; called by another thread."""
        self._done += 1
        self._hits += cache_hit
        if self.lines:
            line = compile_line(self._done, self._total, program=program, seconds=self._seconds, cache_hit=cache_hit)
            self._logger.info("%s", line)
        if self._done == self._total:
            self._logger.info("%s", programs_line(self._done, self._hits, self._seconds))

    def wait(self, compiled: Future[None]) -> None:
        """Wait for the programs that the start needs, and tell how far they are. Raises their error."""
        while wait((compiled,), _TELL_S).not_done:
            self._report()
        compiled.result()
        self._report(last=True)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _report(self, last: bool = False) -> None:
        seconds = self._seconds
        if seconds - self._told < _TELL_S and not last:
            return
        self._told, ready = seconds, min(self._done, self._needed)
        # Both go on at the same time, so the slower one decides; neither is known before a part of it is done.
        shares = self._weights, ready / self._needed if self._needed else 1.0
        left = round(max(seconds / share - seconds for share in shares)) if all(shares) else None
        self._tell(Starting(self._weights, ready, self._needed, self._done > self._hits, left))


@contextmanager
def launch_progress(
    logger: logging.Logger, num_programs: int, num_needed: int, tell: Tell = lambda now: None
) -> Iterator[LaunchProgress]:
    """Yield the progress of a start, with a live view of it while the block runs on a terminal."""
    if not sys.stderr.isatty():
        logger.info("%s", start_line(num_needed))
        yield LaunchProgress(logger, num_programs, num_needed, tell)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        weights = live.add_task("weights", total=1.0, said="0%")
        programs = live.add_task("programs", total=num_needed or 1, said="")

        def show(now: Starting) -> None:
            live.update(weights, completed=now.weights, said=f"{now.weights:.0%}")
            live.update(programs, completed=now.num_ready, said=now.programs_text)
            tell(now)

        progress = LaunchProgress(logger, num_programs, num_needed, show, lines=False)
        yield progress
    progress.lines = True  # for the programs that are compiled later
