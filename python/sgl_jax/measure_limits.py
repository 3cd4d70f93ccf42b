"""`python -m sgl_jax.measure_limits`: memory bandwidth and matmul rate of this machine's devices."""

from sgl_jax.tools.benchmark.door import door

main = door("measure_limits")

if __name__ == "__main__":
    raise SystemExit(main())
