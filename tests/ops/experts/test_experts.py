"""The kernels of routed experts do what the reference does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.models.layers import gated
from sgl_jax.ops.experts import pallas_tpu, reference
from sgl_jax.ops.experts.pallas_tpu import Blocks

LAYERS, EXPERTS, CHOICES = 2, 5, 3
SOME = Blocks(64, 4 << 20)
SILU = functools.partial(gated, activation="silu")


def _interpreted(*args, blocks: Blocks = SOME) -> jax.Array:
    """Run the kernels on this machine; unwritten memory is NaN, and a race is an error."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        return jax.jit(functools.partial(pallas_tpu.routed_experts, gated=SILU, num_experts=EXPERTS, blocks=blocks))(
            *args
        )


def _inputs(tokens: int, width: int = 256, neurons: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw tokens, both stacks of matrices and the weights of the choices."""
    rng = np.random.default_rng(tokens)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    gate_up = draw(LAYERS, EXPERTS, 2 * neurons, width) / 16
    return draw(tokens, width), gate_up, draw(LAYERS, EXPERTS, width, neurons) / 8, abs(draw(tokens, CHOICES))


def _choose(tokens: int) -> np.ndarray:
    """Draw the experts of each token, different ones, number EXPERTS among them, which is none."""
    rng = np.random.default_rng(tokens)
    return np.stack([rng.permutation(EXPERTS + 1)[:CHOICES] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize(
    ("tokens", "width", "neurons"),
    [(1, 128, 16), (23, 256, 48), (40, 384, 256), (40, 1024, 128), (130, 128, 16)],
    ids=["one", "odd", "down as stored", "lines of whole registers", "pieces"],
)
def test_tokens_go_through_their_experts(tokens: int, width: int, neurons: int) -> None:
    x, gate_up, down, weights = _inputs(tokens, width, neurons)
    expert = _choose(tokens)
    for layer in range(LAYERS):
        out = _interpreted(x, gate_up, down, jnp.int32(layer), expert, weights)
        np.testing.assert_allclose(
            out, reference.routed_experts(x, gate_up, down, layer, expert, weights), rtol=1e-5, atol=2e-5
        )


@settings(max_examples=8, deadline=None)
@given(counts=st.lists(st.integers(0, 23), min_size=CHOICES, max_size=CHOICES))
def test_experts_of_any_number_of_tokens(counts: list[int]) -> None:
    """Expert i has the first counts[i] tokens; others have none, so that some experts fill several items."""
    x, gate_up, down, weights = _inputs(23)
    expert = np.where(np.arange(23)[:, None] < counts, np.arange(CHOICES), EXPERTS).astype(np.int32)
    out = _interpreted(x, gate_up, down, 1, expert, weights)
    np.testing.assert_allclose(
        out, reference.routed_experts(x, gate_up, down, 1, expert, weights), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("tokens", [300, 450], ids=["items in parts", "items as a whole"])
def test_an_expert_with_more_tokens_than_an_item_holds(tokens: int) -> None:
    """An item of 256 rows is multiplied as a whole where experts have as many tokens on average."""
    x, gate_up, down, weights = _inputs(tokens, 128, 16)
    expert = np.full((tokens, CHOICES), EXPERTS, np.int32)
    expert[:, 1], expert[::3, 0] = 2, 4
    out = _interpreted(x, gate_up, down, 0, expert, weights, blocks=Blocks(tokens, 4 << 20))
    np.testing.assert_allclose(
        out, reference.routed_experts(x, gate_up, down, 0, expert, weights), rtol=1e-5, atol=2e-5
    )


def test_blocks_of_both_matrices() -> None:
    x, gate_up, down, weights = _inputs(40, 384, 256)
    expert = _choose(40)
    out = _interpreted(x, gate_up, down, 0, expert, weights, blocks=Blocks(64, 4 * 128 * 384))
    np.testing.assert_allclose(
        out, reference.routed_experts(x, gate_up, down, 0, expert, weights), rtol=1e-5, atol=2e-5
    )


def test_experts_without_tokens_are_not_multiplied_and_tokens_without_experts_not_read() -> None:
    x, gate_up, down, weights = _inputs(20)
    expert = np.full((20, CHOICES), EXPERTS, np.int32)
    expert[::2, 0] = 3
    x[1::2], gate_up[:, :3], down[:, 4] = np.nan, np.nan, np.nan
    out = _interpreted(x, gate_up, down, 0, expert, weights)
    assert np.isfinite(out).all()
    assert not np.any(out[1::2])


def test_bfloat16_sums_in_float32() -> None:
    x, gate_up, down = (jnp.asarray(array, jnp.bfloat16) for array in _inputs(23)[:3])
    expert, weights = _choose(23), _inputs(23)[3]
    out = _interpreted(x, gate_up, down, 1, expert, weights)
    assert out.dtype == jnp.bfloat16
    expected = reference.routed_experts(x, gate_up, down, 1, expert, weights)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1 / 64, atol=2e-2)
