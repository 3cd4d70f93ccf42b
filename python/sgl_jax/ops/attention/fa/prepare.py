"""Norm and rotation of q and k inside the kernels, on lines that lie in VMEM anyway."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.api import QKPrepare

Ref = Any


@dataclasses.dataclass(frozen=True)
class Prepare:
    """What is done to q and k, as far as a program knows it."""

    head_dim: int  # without padding
    eps: float
    norms: bool
    half: int  # the rotation pairs dimension i with half + i; 0: none
    dtype: Any  # rounded to after the norm, as it is where the norm is an operation of its own

    def __call__(self, x: jax.Array, weight: jax.Array | None, rope: jax.Array | None) -> jax.Array:
        """x f32[R, H] of one head, the norm's weight f32[1, H], the table's lines f32[R, H] (QKPrepare.rope)."""
        if weight is not None:
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


@dataclasses.dataclass(frozen=True)
class Operands:
    """A QKPrepare as the kernels take it."""

    spec: Prepare
    norms: jax.Array | None  # f32[2, H]: of q, of k
    rope: jax.Array | None  # f32[T, H]


def operands(prepare: QKPrepare | None, num_tokens: int, head_dim: int, pool_dim: int, dtype: Any) -> Operands:
    """Padded to num_tokens lines and to the pool's head dim."""
    if prepare is None:
        return Operands(Prepare(head_dim, 0.0, False, 0, dtype), None, None)
    norms = rope = None
    if prepare.q_norm is not None and prepare.k_norm is not None:
        norms = jnp.stack([prepare.q_norm, prepare.k_norm]).astype(jnp.float32)
        norms = jnp.pad(norms, ((0, 0), (0, pool_dim - head_dim)))
    half = 0
    if prepare.rope is not None:
        lines, width = prepare.rope.shape
        half = width // 2
        rope = jnp.pad(prepare.rope.astype(jnp.float32), ((0, num_tokens - lines), (0, pool_dim - width)))
    return Operands(Prepare(head_dim, prepare.eps, norms is not None, half, dtype), norms, rope)
