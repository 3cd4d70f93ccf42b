"""Routing and dispatch equal plain numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.models.decoder_config import MoeConfig
from sgl_jax.models.layers import gated
from sgl_jax.models.linear import grouped_linear
from sgl_jax.models.moe import LayerExperts, dispatch, route
from sgl_jax.models.weights import Experts, MoeWeights
from sgl_jax.ops.experts import pallas_tpu
from sgl_jax.ops.experts.api import LINE, RoutedExperts
from sgl_jax.ops.grouped_matmul import native
from sgl_jax.ops.quantized_matmul.native import quantized_grouped_matmul

QUANTISED = functools.partial(quantized_grouped_matmul, grouped_matmul=native.grouped_matmul)
MULTIPLY = functools.partial(grouped_linear, product=native.grouped_matmul, quantised_product=QUANTISED)
T, D, E, X, F = 6, 8, 8, 2, 4
RNG = np.random.default_rng(0)
TOKENS = RNG.standard_normal((T, D)).astype(np.float32)
ROUTER = RNG.standard_normal((E, D)).astype(np.float32)
BIAS = RNG.standard_normal(E).astype(np.float32)


def _weights(bias: np.ndarray | None = None) -> MoeWeights:
    nothing = Experts(*[None] * len(Experts.__dataclass_fields__))
    fields = dict.fromkeys(MoeWeights.__dataclass_fields__)
    return MoeWeights(**(fields | {"router": jnp.asarray(ROUTER), "score_bias": bias, "experts": nothing}))


def _by_hand(moe: MoeConfig, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Route token by token: Qwen's softmax routing, DeepSeek's sigmoid routing with groups."""
    weights, ids = np.zeros((T, X)), np.zeros((T, X), int)
    for t in range(T):
        logits = ROUTER.astype(np.float64) @ TOKENS[t]
        scores = np.exp(logits) / np.exp(logits).sum() if moe.scoring == "softmax" else 1 / (1 + np.exp(-logits))
        choice = scores if bias is None else scores + bias
        size = E // moe.num_groups
        groups = choice.reshape(moe.num_groups, size)
        best = [sorted(group)[-1] if moe.group_score == "max" else sum(sorted(group)[-2:]) for group in groups]
        allowed = np.argsort(best)[-moe.groups_per_token :]
        candidates = [e for e in range(E) if e // size in allowed]
        ids[t] = sorted(candidates, key=lambda e: -choice[e])[:X]
        weights[t] = scores[ids[t]]
        if moe.normalise:
            weights[t] /= weights[t].sum()
    return weights * moe.scale, ids


@pytest.mark.parametrize(
    ("changes", "bias"),
    [
        ({}, None),
        ({"normalise": False}, None),
        ({"scoring": "sigmoid", "correction_bias": True, "scale": 2.5}, BIAS),
        (
            {
                "scoring": "sigmoid",
                "correction_bias": True,
                "num_groups": 4,
                "groups_per_token": 2,
                "group_score": "top2",
            },
            BIAS,
        ),
        ({"num_groups": 4, "groups_per_token": 1, "normalise": False, "scale": 16.0}, None),
    ],
)
def test_tokens_take_the_experts_of_the_published_rule(changes: dict, bias: np.ndarray | None) -> None:
    moe = MoeConfig(num_experts=E, experts_per_token=X, intermediate_size=F, **changes)
    weights, ids = route(jnp.asarray(TOKENS), _weights(bias), moe)
    expected_weights, expected_ids = _by_hand(moe, bias)
    assert ids.tolist() == expected_ids.tolist()
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def _interpreted(*args) -> jax.Array:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return pallas_tpu.routed_experts(*args, blocks=pallas_tpu.Blocks(4, 1 << 20))


@pytest.mark.parametrize("routed", [None, _interpreted], ids=["one by one", "one operation"])
def test_dispatch_weighs_and_sums_and_leaves_padding_out(routed: RoutedExperts | None) -> None:
    width = D if routed is None else LINE
    gate_up = RNG.standard_normal((1, E, 2 * F, width)).astype(np.float32)
    down = RNG.standard_normal((1, E, width, F)).astype(np.float32)
    values = RNG.standard_normal((T, width)).astype(np.float32)
    ids = np.stack([RNG.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    weights = RNG.random((T, X)).astype(np.float32)
    valid = np.array([True, True, False, True, True, False])
    tokens = np.where(valid[:, None], values, np.nan)  # values of padding must not matter
    at = LayerExperts(_experts(gate_up, down), jnp.int32(0))
    out = dispatch(
        jnp.asarray(tokens),
        jnp.asarray(weights),
        jnp.asarray(ids),
        jnp.asarray(valid),
        at,
        functools.partial(gated, activation="silu"),
        MULTIPLY,
        routed=routed,
    )
    expected = np.zeros((T, width))
    for t in np.flatnonzero(valid):
        for weight, e in zip(weights[t], ids[t], strict=True):
            gate, up = np.split(gate_up[0, e].astype(np.float64) @ values[t], 2)
            expected[t] += weight * (down[0, e] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def _experts(gate_up: np.ndarray, down: np.ndarray) -> Experts:
    fields = dict.fromkeys(Experts.__dataclass_fields__)
    return Experts(**(fields | {"gate_up": jnp.asarray(gate_up), "down": jnp.asarray(down)}))
