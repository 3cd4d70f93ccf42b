"""Functions of all measuring tools on a terminal: say a mistake in one line, show progress and tables, end with a code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sgl_jax.settings.flag_parser import FlagError

SOME_FAILED, BAD_USE, INTERRUPTED = 1, 2, 130


class BenchmarkError(Exception):
    """A mistake of the user or the server, told without a traceback."""


def exit_code(tool: str, run: Callable[[], int]) -> int:
    """Exit codes that `run` returns; 2 for a BenchmarkError and for a flag that is refused, 130 for Ctrl-C."""
    try:
        return run()
    except (BenchmarkError, FlagError) as error:
        say(tool, f"error: {error}")
        return BAD_USE
    except KeyboardInterrupt:
        say(tool, "interrupted")
        return INTERRUPTED


def say(tool: str, line: str) -> None:
    """On standard error: the standard output is the result."""
    print(f"{tool}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def request_progress(total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """A bar of finished requests on standard error where that is a terminal. Gives what to call after each request."""
    if not show or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich import progress as bar
    from rich.console import Console

    columns = (
        "requests",
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
    )
    with bar.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


class Column(NamedTuple):
    title: str
    field: str  # of the record
    form: str = "{}"  # as str.format takes it
    scale: float = 1  # of the unit in the title to the field's

    def cell(self, record: Mapping[str, Any]) -> str:
        value = record.get(self.field)
        return "–" if value is None else self.form.format(value if self.scale == 1 else value * self.scale)


def markdown_table(columns: Sequence[Column], records: Sequence[Mapping[str, Any]]) -> str:
    """A row per record. A field that is missing or None is a dash; a column of dashes is left out."""
    columns = [column for column in columns if any(record.get(column.field) is not None for record in records)]
    rows = [[column.title for column in columns], *([column.cell(record) for column in columns] for record in records)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---:|" * len(columns), *lines[1:]])
