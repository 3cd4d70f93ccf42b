"""Adapters at products: plain XLA and each library for CPUs against a loop over tokens in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.ops.adapter_addend import AdapterAddend, library_addend, plain_addend
from sgl_jax.ops.cpu.library import processor_flags, register, usable

LIBRARIES = usable(processor_flags())
IMPLEMENTATIONS = ["plain", *LIBRARIES]


def implementation(name: str) -> AdapterAddend:
    return plain_addend if name == "plain" else library_addend(register(LIBRARIES[name]))


def reference(x: np.ndarray, slots: np.ndarray, a: np.ndarray, b: list[np.ndarray], num_slots: int) -> np.ndarray:
    rank = a.shape[1] // num_slots
    by_slot = a.reshape(len(b), num_slots, rank, -1)
    out = np.zeros((len(x), sum(each.shape[1] for each in b)))
    for t, slot in enumerate(slots):
        if slot >= 0:
            parts = [by_slot[p, slot] @ x[t] @ each[slot * rank :][:rank] for p, each in enumerate(b)]
            out[t] = np.concatenate(parts)
    return out


# tokens, slots, rank, inputs, outputs of each part
SHAPES = [
    (1, 1, 8, 64, (64,)),
    (7, 3, 4, 32, (48, 16, 16)),
    (33, 8, 16, 96, (80, 80)),
    (5, 2, 1, 16, (16,)),
    (3, 2, 300, 64, (32, 160)),  # a rank of several blocks
    (4, 2, 8, 24, (40,)),  # sides that the library leaves to plain XLA
]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_gets_the_addend_of_its_own_adapter(name: str, dtype: str, shape: tuple) -> None:
    tokens, num_slots, rank, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x, *factors = (
        jnp.asarray(rng.standard_normal(each, np.float32), dtype)
        for each in (
            (tokens, inputs),
            (len(outputs), num_slots * rank, inputs),
            *((num_slots * rank, o) for o in outputs),
        )
    )
    slots = rng.integers(-1, num_slots, tokens).astype(np.int32)
    y = jnp.asarray(rng.standard_normal((tokens, sum(outputs)), np.float32), dtype)
    add = jax.jit(implementation(name), static_argnums=5)
    got = add(y, x, slots, factors[0], tuple(factors[1:]), num_slots)
    exact = [np.asarray(each, np.float64) for each in (x, *factors)]
    expected = np.asarray(y, np.float64) + reference(exact[0], slots, exact[1], exact[2:], num_slots)
    assert got.dtype == x.dtype
    scale = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        np.asarray(got, np.float64) / scale, expected / scale, atol=2e-6 if dtype == "float32" else 2e-2
    )
    assert (np.asarray(got)[slots < 0] == np.asarray(y)[slots < 0]).all()


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_token_gets_the_same_bits_whoever_is_beside_it(name: str) -> None:
    rng = np.random.default_rng(1)
    shapes = ((9, 48), (9, 64), (1, 32, 64), (32, 48))
    y, x, a, b = (jnp.asarray(rng.standard_normal(each, np.float32)) for each in shapes)
    add = jax.jit(implementation(name), static_argnums=5)
    slots = np.array([0, 1, 1, 1, 0, 1, 1, -1, 1], np.int32)
    together = np.asarray(add(y, x, slots, a, (b,), 2))
    for t in range(9):
        assert (np.asarray(add(y[t : t + 1], x[t : t + 1], slots[t : t + 1], a, (b,), 2)) == together[t]).all()
