"""Tests of the products of long steps: with barriers and without, they give the same."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from sgl_jax.models import long_steps
from sgl_jax.models.layers import gated
from sgl_jax.models.linear import linear

ACT = functools.partial(gated, activation="silu", limit=1.5)


def arrays(num_tokens: int, num_neurons: int, has_bias: bool) -> list[np.ndarray | None]:
    """Return tokens [T, 8], gate and up, their bias, and down."""
    random = np.random.default_rng(num_tokens + num_neurons)
    shapes = (num_tokens, 8), (2 * num_neurons, 8), (2 * num_neurons,), (8, num_neurons)
    found: list[np.ndarray | None] = [random.standard_normal(shape, np.float32) for shape in shapes]
    return found if has_bias else [*found[:2], None, found[3]]


def run(given: list[np.ndarray | None], *, has_barriers: bool) -> tuple[jax.Array, int]:
    """Return the MLP's output and the number of its products."""
    function = jax.jit(functools.partial(long_steps.mlp, act=ACT, linear=linear, has_barriers=has_barriers))
    return function(*given), str(function.trace(*given).jaxpr).count("dot_general")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_products"), [(1024, 3), (2048, 6)], ids=["whole", "two pieces"])
def test_separate_products_give_what_two_give(num_tokens: int, num_products: int, has_bias: bool) -> None:
    given = arrays(num_tokens, 8192, has_bias)
    (together, number), (apart, number_apart) = run(given, has_barriers=False), run(given, has_barriers=True)
    assert (number, number_apart) == (2, num_products)
    np.testing.assert_allclose(apart, together, rtol=1e-4, atol=2e-3)
    h, w, bias, down = (None if each is None else each.astype(np.float64) for each in given)
    assert h is not None
    assert w is not None
    assert down is not None
    gate, up = np.split(h @ w.T + (0 if bias is None else bias), 2, axis=-1)
    gate, up = np.minimum(gate, 1.5), np.clip(up, -1.5, 1.5)
    np.testing.assert_allclose(apart, gate / (1 + np.exp(-gate)) * up @ down.T, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("num_tokens", "num_neurons"), [(512, 8192), (1024, 4096)])
def test_short_steps_and_small_shards_are_left_to_the_compiler(num_tokens: int, num_neurons: int) -> None:
    given = arrays(num_tokens, num_neurons, has_bias=True)
    assert run(given, has_barriers=True)[1] == 2
    h, _, _, down = given
    behind = functools.partial(long_steps.behind_norm, has_barriers=True)
    assert "optimization_barrier" not in str(jax.make_jaxpr(behind)(h, down))


def test_a_norm_is_behind_a_barrier_where_many_rows_follow() -> None:
    h, w, _, _ = arrays(1024, 2048, has_bias=False)
    for has_barriers in (False, True):
        behind = functools.partial(long_steps.behind_norm, has_barriers=has_barriers)
        assert ("optimization_barrier" in str(jax.make_jaxpr(behind)(h, w))) == has_barriers


@pytest.mark.parametrize(("num_tokens", "num_products"), [(2049, 3), (2051, 3), (4096, 12)])
def test_pieces_are_equal_and_long(num_tokens: int, num_products: int) -> None:
    """2049 tokens are three times 683, which is too short for a piece; 2051 have the divisors 7 and 293."""
    given = [None if each is None else jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays(8, 8192, False)]
    given[0] = jax.ShapeDtypeStruct((num_tokens, 8), np.float32)
    function = functools.partial(long_steps.mlp, act=ACT, linear=linear, has_barriers=True)
    assert str(jax.make_jaxpr(function)(*given)).count("dot_general") == num_products
