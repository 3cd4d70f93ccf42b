"""How the measuring tools end: a mistake is told in one line, and the exit code says what came of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable

SOME_FAILED, BAD_USE, INTERRUPTED = 1, 2, 130


class BenchmarkError(Exception):
    """A mistake of the user or the server, told without a traceback."""


def exit_code(tool: str, run: Callable[[], int]) -> int:
    """What `run` returns; 2 for a BenchmarkError, 130 for Ctrl-C."""
    try:
        return run()
    except BenchmarkError as error:
        say(tool, f"error: {error}")
        return BAD_USE
    except KeyboardInterrupt:
        say(tool, "interrupted")
        return INTERRUPTED


def say(tool: str, line: str) -> None:
    """On standard error: the standard output is the result."""
    print(f"{tool}: {line}", file=sys.stderr, flush=True)
