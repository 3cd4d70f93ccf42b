"""Starts a tool from its command line: flags are parsed before anything heavy is imported."""

import importlib
from collections.abc import Callable, Sequence

from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.tools.benchmark.arguments import TOOLS, parse
from sgl_jax.tools.benchmark.terminal import BAD_USE, INTERRUPTED, BenchmarkError, say


def door(tool: str) -> Callable[..., int]:
    """Return the `main(argv, prog)` of a tool; without `argv` it reads this process's command line.

    Its exit code is the tool's own: 0, or 1 when something failed; 2 for a mistake in the use, 130 for Ctrl-C.
    """

    def main(argv: Sequence[str] | None = None, prog: str = "") -> int:
        def run() -> int:
            args, rest = parse(tool, argv, prog)
            code = importlib.import_module(f"sgl_jax.tools.benchmark.{TOOLS[tool].module}").main(args, rest)
            for name in ("output_file", "result_filename", "output"):  # a tool has one of them at most
                if (path := getattr(args, name, None)) is not None and path.exists():
                    say(tool, f"wrote {path.resolve()}")
            return code

        return exit_code(tool, run)

    return main


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
