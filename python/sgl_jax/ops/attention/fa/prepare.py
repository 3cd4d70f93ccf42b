"""Norm and rotation of q and k inside the kernels, on lines that lie in VMEM anyway."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.api import QKPrepare
from sgl_jax.ops.attention.fa.ring import Ref


@dataclasses.dataclass(frozen=True)
class Prepare:
    """The static part of a QKPrepare."""

    head_dim: int  # without padding
    eps: float
    half: int  # the rotation pairs dimension i with half + i; 0: none
    dtype: Any  # rounded to after the norm, as it is where the norm is an operation of its own

    def __call__(self, x: jax.Array, norm: Ref | None, rope: jax.Array | None) -> jax.Array:
        """Norm and rotate x f32[R, H] of one head, with the weight VMEM [1, H] and cos and sin f32[R, H] (QKPrepare)."""
        if norm is not None:
            weight = norm[...].astype(jnp.float32)
            mean = jnp.sum(x * x, axis=1, keepdims=True) * (1 / self.head_dim)
            x = (x * lax.rsqrt(mean + self.eps) * weight).astype(self.dtype).astype(jnp.float32)
        if rope is None:
            return x
        width, half = x.shape[1], self.half
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        left = lambda a: pltpu.roll(a, width - half, 1)  # lane i takes lane i + half  # noqa: E731
        right = (lambda a: pltpu.roll(a, half, 1)) if 2 * half != width else left
        cos = jnp.where(lane < half, rope, jnp.where(lane < 2 * half, right(rope), 1))
        sin = jnp.where(lane < half, -left(rope), jnp.where(lane < 2 * half, rope, 0))
        return x * cos + (left(x) if 2 * half == width else jnp.where(lane < half, left(x), right(x))) * sin


def operands(
    prepare: QKPrepare | None, num_tokens: int, head_dim: int, pool_dim: int, dtype: Any
) -> tuple[Prepare, dict[str, jax.Array | None]]:
    """Return a QKPrepare as the kernels take it, padded to num_tokens lines and to the pool's head dim: the static part,
    and the arrays of kernel_call.Tokens."""
    if prepare is None:
        return Prepare(head_dim, 0.0, 0, dtype), {"q_norm": None, "k_norm": None, "rope": None}

    def line(weight: jax.Array | None) -> jax.Array | None:
        return None if weight is None else jnp.pad(weight, (0, pool_dim - head_dim))[None]

    half, rope = 0, prepare.rope
    if rope is not None:
        lines, width = rope.shape
        half = width // 2
        rope = jnp.pad(rope.astype(jnp.float32), ((0, num_tokens - lines), (0, pool_dim - width)))
    arrays = {"q_norm": line(prepare.q_norm), "k_norm": line(prepare.k_norm), "rope": rope}
    return Prepare(head_dim, prepare.eps, half, dtype), arrays
