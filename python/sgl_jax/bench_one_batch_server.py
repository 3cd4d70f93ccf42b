"""`python -m sgl_jax.bench_one_batch_server`: single batches through a server; docs/features/benchmarking.md."""

from sgl_jax.tools.benchmark.door import door

main = door("bench_one_batch_server")

if __name__ == "__main__":
    raise SystemExit(main())
