"""Every implementation of grouped matmul does what the reference does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.grouped_matmul import native, pallas_tpu, reference
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul


def _interpreted(x: jax.Array, w: jax.Array, layer: jax.Array | int, group_sizes: jax.Array) -> jax.Array:
    """Run the TPU kernel on this machine; unwritten memory is NaN, and a race is an error."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        return pallas_tpu.grouped_matmul(x, w, layer, group_sizes)


IMPLEMENTATIONS = {"native": native.grouped_matmul, "ragged_dot": native.ragged_dot, "pallas_tpu": _interpreted}
LAYERS, GROUPS, OUT, IN, ROWS = 2, 5, 24, 16, 40

implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)
sizes = st.lists(st.integers(0, 12), min_size=GROUPS, max_size=GROUPS).filter(lambda x: sum(x) <= ROWS)


def _inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, IN)).astype(dtype)
    w = rng.standard_normal((LAYERS, GROUPS, OUT, IN)).astype(dtype)
    return x, w


@implementations
def test_it_is_an_implementation_of_the_contract(name: str) -> None:
    assert isinstance(IMPLEMENTATIONS[name], GroupedMatmul)


@implementations
@settings(max_examples=12, deadline=None)
@given(group_sizes=sizes, layer=st.integers(0, LAYERS - 1))
def test_each_row_is_multiplied_with_its_groups_matrix(name: str, group_sizes: list[int], layer: int) -> None:
    x, w = _inputs()
    out = jax.jit(IMPLEMENTATIONS[name])(x, w, jnp.int32(layer), jnp.array(group_sizes, jnp.int32))
    expected = reference.grouped_matmul(x, w, layer, group_sizes)
    assert out.shape == expected.shape
    used = sum(group_sizes)
    np.testing.assert_allclose(out[:used], expected[:used], atol=1e-5)


@implementations
def test_bfloat16_sums_in_float32(name: str) -> None:
    x, w = _inputs(jnp.bfloat16)
    out = IMPLEMENTATIONS[name](jnp.asarray(x), jnp.asarray(w), 0, jnp.array([8] * GROUPS, jnp.int32))
    assert out.dtype == jnp.bfloat16
    expected = reference.grouped_matmul(x, w, 0, [8] * GROUPS)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1 / 128, atol=1e-2)


def test_native_touches_only_the_matrices_of_groups_that_have_rows() -> None:
    x, w = _inputs()
    w[:, [0, 2, 4]] = np.nan
    out = native.grouped_matmul(jnp.asarray(x), jnp.asarray(w), 1, jnp.array([0, 3, 0, 30, 0], jnp.int32))
    assert np.isfinite(out).all()
