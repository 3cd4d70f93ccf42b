"""`python -m sgl_jax.profile_stages`: where a profile's time went, by stage; docs/features/profiling.md."""

from sgl_jax.tools.benchmark.door import door

main = door("profile_stages")

if __name__ == "__main__":
    raise SystemExit(main())
