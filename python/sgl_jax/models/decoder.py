"""The one decoder: embed, layers, norm, logits. What differs between families are switches of DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.layers import ACTIVATIONS, apply_rope, rms_norm, rope_tables
from sgl_jax.models.weights import LayerWeights, Weights, head
from sgl_jax.parallel.tensor import ONE_DEVICE, TensorAxis


@runtime_checkable  # so that tests can check annotations
class Attend(Protocol):
    """Attention with the step's batch, pool geometry and backend filled in: (q, k, v, kv, layer, window) -> (o, kv)."""

    def __call__(
        self,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        kv: Float[Array, "LP K 2 page H"],
        *,
        layer: Int[Array, ""] | int,
        window: Int[Array, ""] | int | None,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "LP K 2 page H"]]: ...


def hidden_states(
    weights: Weights,
    config: DecoderConfig,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    kv: Float[Array, "LP K 2 page H"],
    attend: Attend,
    axis: TensorAxis = ONE_DEVICE,
) -> tuple[Float[Array, "T D"], Float[Array, "LP K 2 page H"]]:
    """The last layer's output, before the final norm, and the pool with this step's KV.

    On a device of a tensor axis, config and weights are its share; x is whole on every device.
    """
    with jax.named_scope("embed"):
        x = _embed(weights.embed, tokens, axis)
        rope = rope_tables(positions, config.rope)
    windows = _windows(config)

    def body(carry, layer: Int[Array, ""] | int, w: LayerWeights):
        x, kv = carry
        with jax.named_scope("attention"):
            h = rms_norm(x, w.attn_norm, config.rms_norm_eps)
            window = None if windows is None else jnp.asarray(windows)[layer]
            h, kv = _attention(h, kv, w, config, rope, attend, axis, layer, window)
            x = x + h
        with jax.named_scope("mlp"):
            h = rms_norm(x, w.mlp_norm, config.rms_norm_eps)
            x = x + _mlp(h, w, config, axis)
        return x, kv

    return run_layers(body, (x, kv), weights.layers)


def logits(weights: Weights, config: DecoderConfig, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Final norm and output head, float32; of a device of a tensor axis, its share of the vocabulary."""
    with jax.named_scope("logits"):
        h = rms_norm(hidden, weights.final_norm, config.rms_norm_eps)
        out = jnp.einsum("vd,sd->vs", head(weights), h, preferred_element_type=jnp.float32).T
        cap = config.final_logit_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)


def run_layers(body: Callable, carry, layers: list[LayerWeights] | LayerWeights):
    """Thread the carry through body(carry, layer index, layer weights): a Python loop over a list, a scan over a stack.

    Which one a platform gets is decided where weights are placed (docs/decisions/0002-layers-list-or-scan.md).
    """
    if isinstance(layers, list):
        layer = jax.jit(body)  # traced and lowered once, not once per layer
        for i, w in enumerate(layers):
            carry = layer(carry, jnp.int32(i), w)
        return carry
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    carry, _ = lax.scan(lambda c, x: (body(c, *x), None), carry, (jnp.arange(num_layers), layers))
    return carry


def _windows(config: DecoderConfig) -> np.ndarray | None:
    """Each layer's window, i32[L], full attention as one wider than any context; None if no layer has a window."""
    if config.sliding_windows is None:
        return None
    return np.array([w if w is not None else 2**30 for w in config.sliding_windows], np.int32)


def _embed(table: Float[Array, "V D"], tokens: Int[Array, " T"], axis: TensorAxis) -> Float[Array, "T D"]:
    local, own = axis.mine(tokens, len(table))
    return axis.sum(jnp.where(own[:, None], table.at[local].get(mode="clip"), 0))


def _attention(h, kv, w: LayerWeights, config: DecoderConfig, rope, attend: Attend, axis: TensorAxis, layer, window):
    num_tokens, heads, kv_heads, head_dim = len(h), config.num_heads, config.num_kv_heads, config.head_dim
    qkv = _project(h, w.qkv, w.qkv_bias).reshape(num_tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
    if config.qk_norm:
        q, k = rms_norm(q, w.q_norm, config.rms_norm_eps), rms_norm(k, w.k_norm, config.rms_norm_eps)
    q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    out, kv = attend(q, k, v, kv, layer=layer, window=window)
    return _project(out.reshape(num_tokens, heads * head_dim), w.o, w.o_bias, axis), kv


def _mlp(h, w: LayerWeights, config: DecoderConfig, axis: TensorAxis):
    gate, up = jnp.split(_project(h, w.gate_up, w.gate_up_bias), 2, axis=-1)
    return _project(ACTIVATIONS[config.activation](gate) * up, w.down, w.down_bias, axis)


def _project(
    x: Float[Array, "T I"],
    w: Float[Array, "O I"],
    bias: Float[Array, " O"] | None,
    inputs_over: TensorAxis = ONE_DEVICE,
) -> Float[Array, "T O"]:
    """`inputs_over`: the axis that divides I."""
    out = inputs_over.sum(jnp.einsum("oi,ti->ot", w, x).T)
    return out if bias is None else out + bias
