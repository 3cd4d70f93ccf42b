"""`python -m sgl_jax.bench_one_batch_server`: single batches through a server; docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.benchmark.batch_arguments import parse_one_batch_server
from sgl_jax.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a case failed, 2 for a mistake in the use, 130 when interrupted."""
    args, server_flags = parse_one_batch_server(argv)
    from sgl_jax.benchmark.one_batch_server import TOOL, measure_batches

    return exit_code(TOOL, lambda: measure_batches(args, server_flags))


if __name__ == "__main__":
    sys.exit(main())
