"""Progress of a start, whose weights are read while its programs compile: a live line on a terminal, or log lines."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sgl_jax.observability.log import compile_line, programs_line, weights_line

_EVERY_S = 5.0  # between two lines about weights


class LaunchProgress:
    """Says how far a start is. `show` puts a text into the live line; None: there is no terminal."""

    def __init__(self, logger: logging.Logger, num_programs: int, show: Callable[[str], None] | None = None):
        self._logger, self.show, self._total = logger, show, num_programs
        self._started = self._said = time.perf_counter()
        self._num_bytes = self._done = self._hits = 0
        self._weights = "loading weights"
        self._tell()

    def read(self, fraction: float, num_bytes: int) -> None:
        """Take in how much of the weights has been read."""
        self._num_bytes, self._weights = num_bytes, f"loading weights {fraction:.0%}"
        if self.show is None and (now := time.perf_counter()) - self._said >= _EVERY_S:
            self._said = now
            self._logger.info("%s", self._weights)
        self._tell()

    def all_read(self) -> None:
        self._weights = "weights loaded"
        self._logger.info("%s", weights_line(self._num_bytes, self._seconds))
        self._tell()

    def compiled(self, program: str, cache_hit: bool) -> None:
        """Take in that a program is ready, read from the cache or compiled; called by another thread."""
        self._done += 1
        self._hits += cache_hit
        if self.show is None:
            line = compile_line(self._done, self._total, program=program, seconds=self._seconds, cache_hit=cache_hit)
            self._logger.info("%s", line)
        if self._done == self._total:
            self._logger.info("%s", programs_line(self._done, self._hits, self._seconds))
        self._tell()

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _tell(self) -> None:
        if self.show is not None:
            first = " (first start only)" if self._done > self._hits else ""
            self.show(f"{self._weights}, {self._done} of {self._total} programs ready{first}")


@contextmanager
def launch_progress(logger: logging.Logger, num_programs: int) -> Iterator[LaunchProgress]:
    """Yield the progress of a start, with a live line and its seconds while the block runs on a terminal."""
    if not sys.stderr.isatty():
        yield LaunchProgress(logger, num_programs)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        task = live.add_task("")
        progress = LaunchProgress(logger, num_programs, lambda text: live.update(task, description=text))
        yield progress
    progress.show = None  # programs that are compiled later get lines of their own
