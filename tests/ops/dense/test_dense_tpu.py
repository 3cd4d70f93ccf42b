"""The kernels for products of many tokens, and the norm of many tokens, do what plain operations do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.models.layers import gated
from sgl_jax.models.linear import gated_linear, linear
from sgl_jax.ops import norm_rope, norm_tpu
from sgl_jax.ops.dense import pallas_tpu
from sgl_jax.ops.dense.pallas_tpu import Blocks

SILU = functools.partial(gated, activation="silu", limit=1.5)
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}  # two roundings to bfloat16


def draw(*shape: int) -> jax.Array:
    numbers = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(numbers, jnp.bfloat16)


def interpreted(function: Callable[..., jax.Array], *args: object) -> jax.Array:
    """Run kernels on this machine; unwritten memory is NaN, and a race is an error."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        return jax.jit(function)(*args)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "blocks"),
    [
        (32, 128, 256, Blocks(32, 128, 32)),
        (48, 256, 384, Blocks(48, 256, 16)),
        (1024, 128, 128, Blocks(1024, 128, 512)),
        (1056, 128, 256, Blocks(528, 128, 176)),
    ],
    ids=["one chunk", "part of a block", "chunks", "pieces of chunks"],
)
@pytest.mark.parametrize("is_gated", [False, True])
def test_blocks_give_the_products_of_float64(
    tokens: int, inputs: int, outputs: int, blocks: Blocks, is_gated: bool
) -> None:
    number = 2 if is_gated else 1
    x, w = draw(tokens, inputs), draw(number, outputs, inputs) / 8
    finish = pallas_tpu.rounded(SILU, x.dtype) if is_gated else pallas_tpu.unchanged
    out = interpreted(lambda x, w: pallas_tpu.multiply(x, w, finish, blocks, "dense"), x, w)
    exact = np.einsum("ti,moi->mto", np.asarray(x, np.float64), np.asarray(w, np.float64))
    if is_gated:
        gate, up = np.minimum(exact[0], 1.5), np.clip(exact[1], -1.5, 1.5)
        exact = (gate / (1 + np.exp(-gate)) * up)[None]
    assert out.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), exact[0], **TOLERANCE)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be traced as for a v6e."""
    info = type("Chip", (), {"vmem_capacity_bytes": 128 << 20})
    monkeypatch.setattr(pallas_tpu.pltpu, "get_tpu_info", info)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "dtype", "out_dtype", "is_kernel"),
    [
        (1024, 1024, 1024, "bfloat16", None, True),
        (1000, 1024, 1024, "bfloat16", None, False),
        (512, 1024, 1024, "bfloat16", None, False),
        (1024, 512, 1024, "bfloat16", None, False),
        (1024, 1024, 512, "bfloat16", None, False),
        (1024, 1024, 1088, "bfloat16", None, False),
        (1024, 1024, 1024, "float32", None, False),
        (1024, 1024, 1024, "bfloat16", "float32", False),
    ],
)
def test_large_products_of_bfloat16_are_the_kernels(
    chip: None, tokens: int, inputs: int, outputs: int, dtype: str, out_dtype: str | None, is_kernel: bool
) -> None:
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, inputs), (outputs, inputs)))
    jaxpr = jax.make_jaxpr(functools.partial(pallas_tpu.product, out_dtype=out_dtype))(x, w)
    assert ("pallas_call" in str(jaxpr), jaxpr.out_avals[0].shape) == (is_kernel, (tokens, outputs))
    assert jaxpr.out_avals[0].dtype == (out_dtype or dtype)
    both = jax.ShapeDtypeStruct((2 * outputs, inputs), dtype)
    if out_dtype is None:
        act = functools.partial(gated_linear, product=pallas_tpu.gated_product, linear=linear, bias=None, gated=SILU)
        assert ("pallas_call" in str(jax.make_jaxpr(act)(x, both))) == is_kernel


def test_tokens_that_do_not_fit_into_vmem_go_in_pieces(chip: None) -> None:
    def blocks(tokens: int, inputs: int) -> Blocks | None:
        x, w = jnp.zeros((tokens, inputs), jnp.bfloat16), jnp.zeros((1, 4096, inputs), jnp.bfloat16)
        return pallas_tpu.blocks_for(x, w, None)

    assert blocks(2048, 14336) == Blocks(2048, 256, 512)
    assert blocks(8192, 14336) == Blocks(2048, 256, 512)
    assert blocks(2048, 1024) == Blocks(2048, 512, 512)
    assert blocks(1072, 1024) is None  # 16 times a prime: chunks would have 16 tokens


def test_a_gated_product_is_that_of_two_operations(chip: None) -> None:
    x, w = draw(1024, 1024), draw(2048, 1024) / 16
    plain = gated_linear(x, w, None, SILU, lambda *args: None, linear)
    out = interpreted(lambda x, w: pallas_tpu.gated_product(x, w, SILU), x, w)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(plain, np.float32), **TOLERANCE)
    bias = jnp.ones(2048, jnp.bfloat16)
    biased = gated_linear(x, w, bias, SILU, pallas_tpu.gated_product, linear)
    np.testing.assert_array_equal(biased, gated_linear(x, w, bias, SILU, lambda *args: None, linear))


@pytest.mark.parametrize(("tokens", "width"), [(128, 1024), (144, 2048), (272, 4096)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_in_one_pass_is_that_of_plain_operations(tokens: int, width: int, offset: float) -> None:
    x, weight = draw(tokens, width), draw(width)
    norm = functools.partial(norm_tpu.rms_norm, eps=1e-3, offset=offset)
    assert "pallas_call" in str(jax.make_jaxpr(norm)(x, weight))
    out = interpreted(norm, x, weight)
    plain = norm_rope.rms_norm(x, weight, 1e-3, offset)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(plain, np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("tokens", "width"), [(128, 1024), (272, 4096)])
def test_a_norm_of_a_sum_is_that_of_plain_operations(tokens: int, width: int) -> None:
    x, out, weight = draw(tokens, width), draw(tokens + 1, width)[1:], draw(width)
    norm = functools.partial(norm_tpu.added_norm, eps=1e-3, offset=1.0)
    assert str(jax.make_jaxpr(norm)(x, out, weight)).count("pallas_call") == 1
    total, normed = interpreted(norm, x, out, weight)
    exact, plain = norm_rope.added_norm(x, out, weight, 1e-3, 1.0)
    np.testing.assert_array_equal(total, exact)
    np.testing.assert_allclose(np.asarray(normed, np.float32), np.asarray(plain, np.float32), rtol=1e-2, atol=1e-2)
    few = norm_tpu.added_norm(x[:8], out[:8], weight, 1e-3, 1.0)
    assert [each.tolist() for each in few] == [each[:8].tolist() for each in (exact, plain)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((64, 1024), "bfloat16"),
        ((128, 512), "bfloat16"),
        ((136, 1024), "bfloat16"),
        ((128, 1024), "float32"),
        ((8, 128, 1024), "bfloat16"),
    ],
)
def test_other_norms_are_plain(shape: tuple[int, ...], dtype: str) -> None:
    x = jax.ShapeDtypeStruct(shape, dtype)
    weight = jax.ShapeDtypeStruct(shape[-1:], dtype)
    assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(norm_tpu.rms_norm, eps=1e-3))(x, weight))
