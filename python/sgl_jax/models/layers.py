"""The pieces of a decoder layer, as functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgl_jax.models.decoder_config import Activation, QueryGrowth, RopeConfig


def rope_table(positions: Int[Array, " T"], rope: RopeConfig) -> Float[Array, "T rope"]:
    """cos, then sin, of each position's rotation angles, float32."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope.inv_freq, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * rope.attention_factor


def query_growth(positions: Int[Array, " T"], growth: QueryGrowth) -> Float[Array, " T"]:
    """The factor of each query, float32. Source: https://kexue.fm/archives/8823, "log n" scaling."""
    seen = jnp.maximum(positions + growth.offset, 1).astype(jnp.float32)
    return jnp.maximum(1.0, jnp.log(seen) / math.log(growth.length))


GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "swiglu_oai": lambda gate, up: (
        gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    ),  # github.com/openai/gpt-oss, torch/model.py
}


def gated(gate_up: Float[Array, "*B FF"], activation: Activation, limit: float | None = None) -> Float[Array, "*B F"]:
    """The activation of gate and up, which lie side by side; `limit` bounds gate from above and up on both sides."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return GATED[activation](gate, up)
