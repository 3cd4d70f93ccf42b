"""`python -m sgl_jax.bench_one_batch`: single batches on the device; see docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.benchmark.errors import BenchmarkError

BAD_USE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when something compiled while it was timed, 2 for a mistake in the use."""
    try:
        from sgl_jax.benchmark.device_batch_arguments import parse

        args, server_args = parse(argv)
        from sgl_jax.benchmark.device_batch_main import measure_batches

        return measure_batches(args, server_args)
    except BenchmarkError as error:
        print(f"bench_one_batch: error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
