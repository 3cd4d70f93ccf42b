"""`python -m sgl_jax.bench_one_batch_server`: single batches through a server; see docs/features/benchmarking.md."""

from __future__ import annotations

import sys

from sgl_jax.benchmark.one_batch_server import main

if __name__ == "__main__":
    sys.exit(main())
