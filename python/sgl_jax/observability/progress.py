"""Progress of loading weights: a bar on a terminal, else a line in the log for each tenth."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sgl_jax.observability.log import weights_line


@contextmanager
def weight_progress(logger: logging.Logger, total_bytes: int) -> Iterator[Callable[[float, int], None]]:
    """Yield the `report` that models.loader calls with the fraction and bytes that are done. Leaving the block without an
    error logs the total, time and speed."""
    started = time.perf_counter()
    done = 0
    with _bar(total_bytes) if sys.stderr.isatty() else _lines(logger) as show:

        def report(fraction: float, num_bytes: int) -> None:
            nonlocal done
            done = num_bytes
            show(fraction, num_bytes)

        yield report
    logger.info("%s", weights_line(done, time.perf_counter() - started))


@contextmanager
def _bar(total_bytes: int) -> Iterator[Callable[[float, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("weights", total=total_bytes)

        def show(fraction: float, num_bytes: int) -> None:
            progress.update(task, completed=num_bytes, total=num_bytes / fraction if fraction else total_bytes)

        yield show


@contextmanager
def _lines(logger: logging.Logger) -> Iterator[Callable[[float, int], None]]:
    shown = 0

    def show(fraction: float, num_bytes: int) -> None:
        nonlocal shown
        tenth = int(fraction * 10)
        if shown < tenth < 10:
            shown = tenth
            logger.info("loading weights %d %%", tenth * 10)

    yield show
