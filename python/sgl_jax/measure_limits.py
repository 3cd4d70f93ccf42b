"""`python -m sgl_jax.measure_limits`: memory bandwidth and matmul rate of this machine's devices."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.machine_limits import parse_measure_limits, show_limits
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when nothing can be measured."""
    return exit_code("measure_limits", lambda: show_limits(parse_measure_limits(argv)))


if __name__ == "__main__":
    sys.exit(main())
