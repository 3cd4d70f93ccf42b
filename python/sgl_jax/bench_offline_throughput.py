"""`python -m sgl_jax.bench_offline_throughput`: a data set through an Engine; docs/features/benchmarking.md."""

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.door import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a request failed, 2 for a mistake in the use, 130 when interrupted."""
    return run_tool("bench_offline_throughput", "offline", argv)


if __name__ == "__main__":
    sys.exit(main())
