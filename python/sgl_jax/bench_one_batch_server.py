"""`python -m sgl_jax.bench_one_batch_server`: single batches through a server; docs/features/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgl_jax.tools.benchmark.batch_arguments import parse_one_batch_server
from sgl_jax.tools.benchmark.terminal import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a case failed, 2 for a mistake in the use, 130 when interrupted."""

    def run() -> int:
        args, server_flags = parse_one_batch_server(argv)
        from sgl_jax.tools.benchmark.one_batch_server import measure_batches

        return measure_batches(args, server_flags)

    return exit_code("bench_one_batch_server", run)


if __name__ == "__main__":
    sys.exit(main())
