"""`python -m sgl_jax.bench_one_batch`: single batches in the engine; see docs/features/benchmarking.md."""

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.door import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when something compiled while it was timed, 2 for a mistake in the use."""
    return run_tool("bench_one_batch", "one_batch", argv)


if __name__ == "__main__":
    sys.exit(main())
