"""`python -m sgl_jax.bench_one_batch`: single batches in the engine; docs/features/benchmarking.md."""

from sgl_jax.tools.benchmark.door import door

main = door("bench_one_batch")

if __name__ == "__main__":
    raise SystemExit(main())
