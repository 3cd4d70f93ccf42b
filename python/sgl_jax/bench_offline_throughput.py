"""`python -m sgl_jax.bench_offline_throughput`: a data set through an Engine; docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.benchmark.errors import BenchmarkError

BAD_USE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a request failed, 2 for a mistake in the use, 130 when interrupted."""
    try:
        from sgl_jax.benchmark.offline_arguments import parse

        args, server_args = parse(argv)
        from sgl_jax.benchmark.offline_main import measure_offline

        return measure_offline(args, server_args)
    except BenchmarkError as error:
        print(f"bench_offline_throughput: error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
