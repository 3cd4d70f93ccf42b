"""Products by the library for CPUs beside plain XLA and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.ops.cpu import library
from sgl_jax.ops.dense.api import plain_product
from sgl_jax.ops.dense.cpu_library import library_product

BUILT = library.usable(library.processor_flags())
pytestmark = pytest.mark.skipif(not BUILT, reason="the library was not built")
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3}


def draw(*shape: int, dtype: str, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def calls_library(x: jax.Array, w: jax.Array, out_dtype: str | None = None) -> bool:
    product = library_product(library.register(next(iter(BUILT.values()))))
    return "sgl_jax_dense" in jax.jit(product, static_argnums=2).lower(x, w, out_dtype).as_text()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"),
    [
        (1, 32, 1),
        (1, 576, 960),
        (2, 64, 35),
        (3, 96, 130),
        (4, 1536, 67),
        (5, 32, 4),
        (6, 1536, 35),
        (7, 64, 33),
        (8, 96, 70),
        (16, 576, 99),
        (15, 2080, 31),
        (17, 96, 8),
        (24, 1536, 45),
        (33, 32, 71),
        (50, 160, 1),
        (64, 576, 68),
    ],
)
def test_a_product_is_that_of_float64(name: str, dtype: str, tokens: int, columns: int, rows: int) -> None:
    product = library_product(library.register(BUILT[name]))
    x, w = draw(tokens, columns, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    for out_dtype in (None, "float32"):
        out = product(x, w, out_dtype)
        assert out.dtype == (out_dtype or dtype)
        error = np.abs(np.asarray(out, np.float64) - exact).max() / np.abs(exact).max()
        assert error < (TOLERANCE["float32"] if out_dtype else TOLERANCE[dtype])
    assert calls_library(x, w)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [2, 4, 8, 35])
def test_a_token_s_product_depends_on_no_other_number(name: str, dtype: str, tokens: int) -> None:
    """Neither on other tokens of the same call, nor on rows beyond the matrix."""
    product = library_product(library.register(BUILT[name]))
    x, w = draw(tokens, 64, dtype=dtype), draw(70, 64, dtype=dtype, seed=1)
    out = product(x, w)
    spoilt = product(x.at[1].set(jnp.nan), w)
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(out, 1, 0))
    np.testing.assert_array_equal(product(x, w[:66]), out[:, :66])


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("live", [[], [0], [2], [0, 1, 3], [1, 2, 3, 4, 6, 7, 8, 9], [*range(1, 30)]])
def test_tokens_that_do_not_count_give_zeros_and_change_no_other(name: str, live: list[int]) -> None:
    mask = np.isin(np.arange(30), live)
    x, w = draw(30, 64, dtype="bfloat16").at[~mask].set(jnp.nan), draw(70, 64, dtype="bfloat16", seed=1)
    out = np.asarray(library_product(library.register(BUILT[name]), jnp.asarray(mask))(x, w))
    assert (out[~mask] == 0).all()
    if live:
        np.testing.assert_array_equal(out[mask], library_product(library.register(BUILT[name]))(x[mask], w))


def test_each_library_is_compiled_for_its_own_instructions() -> None:
    """Their sources are the same files, so objects in one folder would be those of whichever was compiled last."""
    contents = {path.read_bytes() for path in BUILT.values()}
    assert len(contents) == len(BUILT)


def test_infinities_and_nans_come_through() -> None:
    product = library_product(library.register(next(iter(BUILT.values()))))
    w = draw(5, 32, dtype="bfloat16").at[1, 3].set(jnp.inf).at[2, 0].set(jnp.nan)
    out = product(jnp.ones((2, 32), jnp.bfloat16), w)
    assert np.isposinf(out[:, 1]).all()
    assert np.isnan(out[:, 2]).all()
    assert np.isfinite(out[:, [0, 3, 4]]).all()


@pytest.mark.parametrize(
    ("tokens", "columns", "dtypes"),
    [
        (65, 64, ("float32", "float32")),
        (1, 172, ("float32", "float32")),
        (1, 64, ("bfloat16", "float32")),
        (1, 64, ("float16", "float16")),
    ],
)
def test_plain_xla_multiplies_what_the_library_does_not_take(
    tokens: int, columns: int, dtypes: tuple[str, str]
) -> None:
    x, w = draw(tokens, columns, dtype=dtypes[0]), draw(10, columns, dtype=dtypes[1], seed=1)
    assert not calls_library(x, w)
    product = library_product(library.register(next(iter(BUILT.values()))))
    np.testing.assert_array_equal(product(x, w), plain_product(x, w))
