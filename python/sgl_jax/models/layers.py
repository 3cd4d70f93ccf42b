"""The pieces of a decoder layer, as functions of arrays."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models.config import Activation, RopeConfig


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32; scales by offset + weight."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (scaled * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def rope_tables(positions: Int[Array, " T"], rope: RopeConfig) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """cos and sin of each position's rotation angles, float32."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope.inv_freq, jnp.float32)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(
    x: Float[Array, "T heads H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T heads H"]:
    """Rotate the first 2 * half dimensions of each head, paired first half with second (Su et al. 2021; GPT-NeoX order)."""
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    a, b, rest = x32[..., :half], x32[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


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
