"""Pieces of a decoder layer, as functions of arrays."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models.decoder_config import Activation, LognScaling, RopeConfig


def rope_table(positions: Int[Array, " T"], rope: RopeConfig) -> Float[Array, "T rope"]:
    """Return cos, then sin, of each position's rotation angles, float32."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope.inv_freq, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * rope.attention_factor


def logn_factors(positions: Int[Array, " T"], scaling: LognScaling) -> Float[Array, " T"]:
    """Return the factor of each query, float32. Source: https://kexue.fm/archives/8823."""
    seen = jnp.maximum(positions + scaling.offset, 1).astype(jnp.float32)
    return jnp.maximum(1.0, jnp.log(seen) / math.log(scaling.length))


def _gelu(x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Return the exact GELU (Hendrycks and Gimpel 2016) by erf, as Pallas for TPU has no erfc."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + lax.erf(x32 / math.sqrt(2)))).astype(x.dtype)


GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: _gelu(gate) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    # github.com/openai/gpt-oss, gpt_oss/torch/model.py
    "swiglu_oai": lambda gate, up: gate * jax.nn.sigmoid(1.702 * gate) * (up + 1),
}


def gated(
    gate: Float[Array, "*B F"], up: Float[Array, "*B F"], activation: Activation, limit: float | None = None
) -> Float[Array, "*B F"]:
    """Apply the activation to gate and up. `limit` bounds gate from above and up on both sides."""
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return GATED[activation](gate, up)
