"""Every implementation of quantised products does what the reference does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.grouped_matmul.native import ragged_dot
from sgl_jax.ops.quantized_matmul import native, pallas_tpu, reference
from sgl_jax.ops.quantized_matmul.api import Planes, QuantizedGroupedMatmul, QuantizedMatmul


def _interpreted(function):
    """Run a TPU kernel on this machine; unwritten memory is NaN, and a race is an error."""

    @functools.wraps(function)
    def run(*args):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
            return function(*args)

    return run


DENSE = {"native": native.quantized_matmul, "pallas_tpu": _interpreted(pallas_tpu.quantized_matmul)}
GROUPED = {
    "native": functools.partial(native.quantized_grouped_matmul, grouped_matmul=ragged_dot),
    "pallas_tpu": _interpreted(pallas_tpu.quantized_grouped_matmul),
}
DTYPES = ("int4", "int8", "float8_e4m3fn")


def _planes(dtype: str, *shape: int, group: int, offsets: bool = False) -> Planes:
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.integers(-8, 8, shape), dtype)
    of_groups = (*shape[:-1], shape[-1] // group)
    scales, zeros = (jnp.asarray(rng.uniform(*span, of_groups), jnp.float32) for span in ((0.5, 1.5), (-2, 2)))
    return Planes(values, scales, zeros if offsets else None)


def _tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)


def _assert_close(out, expected) -> None:
    """Compare products of bfloat16 tokens: sums are float32; matrix and result may be rounded to bfloat16."""
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2**-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", DENSE)
def test_they_are_implementations_of_the_contract(name: str) -> None:
    assert isinstance(DENSE[name], QuantizedMatmul)
    assert isinstance(GROUPED[name], QuantizedGroupedMatmul)


# Tokens, outputs, inputs, inputs of a group: few and many tokens, blocks that do not divide the outputs, groups below and
# above a lane tile, as many groups as fill one, and inputs that fill none.
SHAPES = [
    (1, 24, 128, 32),
    (7, 200, 256, 64),
    (130, 300, 512, 128),
    (130, 256, 256, 32),
    (3, 128, 512, 256),
    (5, 128, 1536, 128),
    (5, 256, 192, 64),
    (2, 128, 4096, 32),
]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_multiplied_with_scaled_values(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    tokens, outputs, inputs, group = shape
    x, w = _tokens(tokens, inputs), _planes(dtype, outputs, inputs, group=group, offsets=dtype == "int4")
    out = DENSE[name](x, w)
    assert (out.shape, out.dtype) == ((tokens, outputs), jnp.bfloat16)
    _assert_close(out, reference.quantized_matmul(x, *w))


@pytest.mark.parametrize("name", DENSE)
def test_the_result_is_as_wide_as_asked(name: str) -> None:
    x, w = _tokens(4, 128), _planes("int8", 128, 128, group=32)
    out = DENSE[name](x, w, None, jnp.float32)
    assert out.dtype == jnp.float32
    if name != "native":  # which rounds the matrix to bfloat16
        np.testing.assert_allclose(out, reference.quantized_matmul(x, *w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_shards_of_a_matrix_give_shards_of_the_product(name: str) -> None:
    """Rows give columns of it, and whole groups of inputs give addends."""
    x, w = _tokens(4, 512), _planes("int4", 256, 512, group=64, offsets=True)
    expected = reference.quantized_matmul(x, *w)
    rows = Planes(*(plane[128:] for plane in w))
    _assert_close(DENSE[name](x, rows), expected[:, 128:])
    halves = [Planes(*(jnp.split(plane, 2, axis=1)[half] for plane in w)) for half in range(2)]
    parts = [DENSE[name](part, half) for part, half in zip(jnp.split(x, 2, axis=1), halves, strict=True)]
    _assert_close(sum(np.asarray(part, np.float64) for part in parts), expected)


@pytest.mark.parametrize("name", DENSE)
def test_tokens_are_rounded_where_that_is_asked(name: str) -> None:
    x, w = _tokens(3, 128), _planes("int8", 128, 128, group=64)
    _assert_close(DENSE[name](x, w, "int8"), reference.quantized_matmul(native.as_rounded(x, "int8"), *w))


def test_groups_across_lane_tiles_are_refused_on_tpu() -> None:
    with pytest.raises(ValueError, match=r"96 inputs share a scale.* 128 .*one scale for each channel"):
        pallas_tpu.quantized_matmul(_tokens(2, 384), _planes("int8", 128, 384, group=96))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("sizes", [(0, 7, 0, 30, 3), (40, 0, 0, 0, 0), (0, 0, 0, 0, 0), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "inputs", "group"), [("int4", 256, 128), ("int8", 128, 128), ("int8", 96, 96), ("float8_e4m3fn", 96, 32)]
)
def test_rows_are_multiplied_with_their_experts_scaled_values(
    name: str, dtype: str, inputs: int, group: int, sizes: tuple[int, ...]
) -> None:
    x, w = _tokens(40, inputs), _planes(dtype, 2, 5, 200, inputs, group=group, offsets=dtype == "int4")
    out = GROUPED[name](x, w, jnp.int32(1), jnp.array(sizes, jnp.int32))
    expected = reference.quantized_grouped_matmul(x, w.values, w.scales, 1, sizes, w.offsets)
    assert (out.shape, out.dtype) == (expected.shape, jnp.bfloat16)
    used = sum(sizes)
    np.testing.assert_allclose(
        np.asarray(out[:used], np.float64), expected[:used], atol=2**-7 * np.abs(expected).max(initial=1)
    )
