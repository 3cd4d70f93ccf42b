"""`python -m sgl_jax.bench_one_batch`: single batches on the device; see docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.batch_arguments import parse_one_batch
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when something compiled while it was timed, 2 for a mistake in the use."""

    def run() -> int:
        args, server_args = parse_one_batch(argv)
        from sgl_jax.tools.benchmark.one_batch import measure_batches

        return measure_batches(args, server_args)

    return exit_code("bench_one_batch", run)


if __name__ == "__main__":
    sys.exit(main())
