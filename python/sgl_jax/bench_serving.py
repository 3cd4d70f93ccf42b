"""`python -m sgl_jax.bench_serving`: a load on a server, measured; docs/features/benchmarking.md."""

from sgl_jax.tools.benchmark.door import door

main = door("bench_serving")

if __name__ == "__main__":
    raise SystemExit(main())
