"""The environment of the engine process."""

from sgl_jax.engine.process import HUGE_PAGES, with_huge_pages


def test_large_arrays_lie_in_huge_pages_unless_the_environment_says_otherwise() -> None:
    assert with_huge_pages({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": HUGE_PAGES}
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=2"}
    assert with_huge_pages(chosen)["GLIBC_TUNABLES"] == f"{HUGE_PAGES}:{chosen['GLIBC_TUNABLES']}"
