"""Products with int8 matrices by plain XLA and by the library for CPUs, beside exact ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.ops.cpu import library
from sgl_jax.ops.quantized_matmul import compiled, native
from sgl_jax.ops.quantized_matmul.api import Planes, QuantizedMatmul, Rounding

BUILT = library.usable(library.processor_flags())
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3}


@pytest.fixture(params=["native", *BUILT])
def product(request: pytest.FixtureRequest) -> QuantizedMatmul:
    name = request.param
    return native.quantized_matmul if name == "native" else compiled.library_matmul(library.register(BUILT[name]))


def fastest() -> QuantizedMatmul:
    return compiled.library_matmul(library.register(next(iter(BUILT.values()))))


def draw(tokens: int, columns: int, rows: int, dtype: str) -> tuple[jax.Array, Planes]:
    """Return tokens of different sizes, one with an outlier, and a matrix in which all values of int8 occur."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, columns), np.float32) * 10.0 ** rng.integers(-3, 4, (tokens, 1))
    x[tokens // 2, columns // 3] *= 100
    values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = (0.01 * rng.random((rows, 1)) + 0.001).astype(np.float32)
    return jnp.asarray(x, dtype), Planes(jnp.asarray(values), jnp.asarray(scales))


def calls_library(x: jax.Array, w: Planes, rounding: Rounding | None, out_dtype: str | None = None) -> bool:
    return "sgl_jax_quantised" in jax.jit(fastest(), static_argnums=(2, 3)).lower(x, w, rounding, out_dtype).as_text()


SHAPES = [
    (1, 64, 1),
    (1, 576, 960),
    (2, 64, 35),
    (3, 128, 130),
    (4, 1536, 67),
    (5, 64, 4),
    (6, 128, 35),
    (7, 64, 33),
    (8, 64, 70),
    (16, 576, 99),
    (15, 2112, 31),
    (17, 128, 8),
    (50, 64, 71),
    (65, 192, 45),
    (256, 576, 68),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_products_with_rounded_tokens_are_exact_sums_of_integers(
    product: QuantizedMatmul, dtype: str, tokens: int, columns: int, rows: int
) -> None:
    x, w = draw(tokens, columns, rows, dtype)
    values, sizes = native.rounded(x, "int8")
    sums = np.asarray(values, np.int64) @ np.asarray(w.values, np.int64).T
    exact = sums.astype(np.float32) * np.asarray(w.scales).T * np.asarray(sizes)
    for out_dtype in (None, "float32"):
        out = product(x, w, "int8", out_dtype)
        assert out.dtype == (out_dtype or dtype)
        last_digit = (
            3e-7 if out.dtype == jnp.float32 else 2**-8
        )  # XLA's quotient of one number has another than of many
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=last_digit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
def test_products_with_tokens_as_they_are_are_those_of_float64(
    product: QuantizedMatmul, dtype: str, tokens: int, columns: int, rows: int
) -> None:
    x, w = draw(tokens, columns, rows, dtype)
    exact = np.asarray(x, np.float64) @ (np.asarray(w.values, np.float64) * np.asarray(w.scales)).T
    for out_dtype in (None, "float32"):
        out = product(x, w, None, out_dtype)
        assert out.dtype == (out_dtype or dtype)
        error = np.abs(np.asarray(out, np.float64) - exact).max(-1) / np.abs(exact).max(-1)
        assert error.max() < (TOLERANCE["float32"] if out_dtype else TOLERANCE[dtype])


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("rounding", ["int8", None])
@pytest.mark.parametrize("live", [[], [3], [0, 2], [1, 2, 3, 4, 6, 7, 9]])
def test_tokens_that_do_not_count_give_zeros_and_change_no_other(
    name: str, rounding: Rounding | None, live: list[int]
) -> None:
    mask = np.isin(np.arange(10), live)
    x, w = draw(10, 64, 35, "bfloat16")
    of_live = compiled.library_matmul(library.register(BUILT[name]), jnp.asarray(mask))
    out = np.asarray(of_live(x.at[~mask].set(jnp.nan), w, rounding))
    assert (out[~mask] == 0).all()
    if live:
        expected = compiled.library_matmul(library.register(BUILT[name]))(x[mask], w, rounding)
        np.testing.assert_array_equal(out[mask], expected)


@pytest.mark.parametrize("rounding", ["int8", None])
def test_a_token_of_zeros_gives_zeros_and_one_with_a_nan_spoils_no_other(
    product: QuantizedMatmul, rounding: Rounding | None
) -> None:
    x, w = draw(5, 64, 70, "bfloat16")
    plain = product(x.at[1].set(0), w, rounding)
    assert not plain[1].any()
    spoilt = product(x.at[1, 7].set(jnp.nan), w, rounding)
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 1, 0), np.delete(plain, 1, 0))


@pytest.mark.skipif(not BUILT, reason="the library was not built")
@pytest.mark.parametrize("rounding", ["int8", None])
@pytest.mark.parametrize("sizes", [(3, 0, 40, 7), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_each_row_is_multiplied_with_its_experts_matrix(rounding: Rounding | None, sizes: tuple[int, ...]) -> None:
    x, w = draw(sum(sizes) + 2, 64, 2 * 4 * 35, "bfloat16")
    planes = Planes(w.values.reshape(2, 4, 35, 64), w.scales.reshape(2, 4, 35, 1))
    grouped = compiled.library_grouped_matmul(library.register(next(iter(BUILT.values()))))
    arguments = x, planes, jnp.int32(1), jnp.array(sizes, jnp.int32), rounding
    assert "sgl_jax_quantised" in jax.jit(grouped, static_argnums=4).lower(*arguments).as_text()
    out = jax.jit(grouped, static_argnums=4)(*arguments)
    assert out.dtype == x.dtype
    for expert, end in enumerate(np.cumsum(sizes)):
        rows, matrix = slice(end - sizes[expert], end), Planes(planes.values[1, expert], planes.scales[1, expert])
        exact = native.quantized_matmul(x, matrix, rounding)[rows].astype(jnp.float32)
        np.testing.assert_allclose(
            out[rows].astype(jnp.float32), exact, rtol=2**-7, atol=2**-7 * abs(exact).max(initial=0)
        )


@pytest.mark.skipif(not BUILT, reason="the library was not built")
def test_plain_xla_multiplies_what_the_library_does_not_take() -> None:
    x, w = draw(3, 64, 10, "bfloat16")
    assert calls_library(x, w, "int8")
    assert calls_library(x, w, None, "float32")
    odd, odd_w = draw(3, 72, 10, "bfloat16")
    by_group = w._replace(scales=jnp.tile(w.scales, (1, 2)))
    others: list[tuple[jax.Array, Planes, Rounding | None]] = [
        (odd, odd_w, "int8"),
        (x, by_group, None),
        (x, w._replace(offsets=w.scales), None),
        (x, w._replace(values=w.values.astype(jnp.float8_e4m3fn)), "float8_e4m3fn"),
        (x.astype(jnp.float16), w, "int8"),
    ]
    for each in others:
        assert not calls_library(*each)
        np.testing.assert_array_equal(fastest()(*each), native.quantized_matmul(*each))
