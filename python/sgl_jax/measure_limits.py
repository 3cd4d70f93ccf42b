"""`python -m sgl_jax.measure_limits`: memory bandwidth and matmul rate of this machine's devices."""

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.door import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when nothing can be measured."""
    return run_tool("measure_limits", "machine_limits", argv)


if __name__ == "__main__":
    sys.exit(main())
