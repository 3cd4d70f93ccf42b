"""`python -m sgl_jax.bench_serving`: a load on a server, measured; `… sweep`: a grid of them."""

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.door import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a request failed, 2 for a mistake in the use, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    return run_tool("sweep", "sweep", argv[1:]) if argv[:1] == ["sweep"] else run_tool("bench_serving", "serving", argv)


if __name__ == "__main__":
    sys.exit(main())
