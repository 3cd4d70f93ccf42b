"""`python -m sgl_jax.bench_offline_throughput`: a data set through an Engine; docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.batch_arguments import parse_offline
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a request failed, 2 for a mistake in the use, 130 when interrupted."""

    def run() -> int:
        args, server_args = parse_offline(argv)
        from sgl_jax.tools.benchmark.offline import measure_offline

        return measure_offline(args, server_args)

    return exit_code("bench_offline_throughput", run)


if __name__ == "__main__":
    sys.exit(main())
