"""Output of all measuring tools: mistakes in one line, progress, blocks and tables, lines of JSON."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sgl_jax.observability import log
from sgl_jax.settings.server_args import FLAGS, SERVER, ServerArgs

logger = logging.getLogger(__name__)

SOME_FAILED, BAD_USE, INTERRUPTED = 1, 2, 130
_WIDTH = 50


class BenchmarkError(Exception):
    """A mistake of the user or the server, told without a traceback."""


def say(tool: str, line: str) -> None:
    """Print on standard error: the standard output is the result."""
    print(f"{tool}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def request_progress(total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error where that is a terminal. Gives what to call after each finished request."""
    from rich.console import Console
    from rich.progress import Progress

    hidden = not (show and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def block(title: str, rows: Mapping[str, str | float | None]) -> str:
    """Format rows by label, as existing parsers of such blocks know them. A row whose value is its label heads a section.

    A float has two decimals, a count is as it is, None is n/a.
    """
    lines = [f"{f' {title} ':=^{_WIDTH}}"]
    for label, value in rows.items():
        shown = f"{value:.2f}" if isinstance(value, float) else "n/a" if value is None else str(value)
        lines.append(f"{label:-^{_WIDTH}}" if value == label else f"{label + ':':<40} {shown:<10}")
    return "\n".join([*lines, "=" * _WIDTH])


def check_writable(path: Path | None, flag: str) -> None:
    """Check before the run, whose result would be lost. Raises BenchmarkError. None: nothing is to be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise BenchmarkError(f"{flag} is {path}; it must be a file in a folder that exists")


def append_jsonl(path: Path | None, result: Mapping[str, Any]) -> None:
    """Append a line; none without a path. Raises BenchmarkError when the file cannot be written."""
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(result)}\n")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error


def start_log(server_args: ServerArgs, without_effect: Collection[str] = ()) -> None:
    """Log on standard error, beginning with the flags that change nothing here: the HTTP server's, and `without_effect`."""
    log.setup(server_args.log_level)
    for flag, message in server_args.notices().items():
        log.once(logger, flag, message)
    changed = server_args.changed()
    for each in FLAGS:
        if each.name in changed and (each.about.group == SERVER or each.name in without_effect):
            log.once(logger, each.option, f"{each.option} has no effect: this tool has no part that it is about.")
