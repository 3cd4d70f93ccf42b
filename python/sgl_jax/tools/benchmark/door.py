"""Starts a tool from its command line: flags are parsed before anything heavy is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.tools.benchmark.arguments import parse
from sgl_jax.tools.benchmark.terminal import BAD_USE, INTERRUPTED, BenchmarkError, say


def run_tool(tool: str, module: str, argv: Sequence[str] | None) -> int:
    """Call `main(args, rest)` of a module beside this one. Returns its exit code, or as `exit_code` says."""

    def run() -> int:
        args, rest = parse(tool, argv)
        return importlib.import_module(f"sgl_jax.tools.benchmark.{module}").main(args, rest)

    return exit_code(tool, run)


def exit_code(tool: str, run: Callable[[], int]) -> int:
    """Return the exit code of `run`; 2 for a BenchmarkError and for a flag that is refused, 130 for Ctrl-C."""
    try:
        return run()
    except (BenchmarkError, FlagError) as error:
        say(tool, f"error: {error}")
        return BAD_USE
    except KeyboardInterrupt:
        say(tool, "interrupted")
        return INTERRUPTED
