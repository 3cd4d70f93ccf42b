"""`python -m sgl_jax.bench_offline_throughput`: a data set through an Engine; docs/features/benchmarking.md."""

from sgl_jax.tools.benchmark.door import door

main = door("bench_offline_throughput")

if __name__ == "__main__":
    raise SystemExit(main())
