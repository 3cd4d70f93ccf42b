"""RMS norm and rotation in plain operations, float32 inside."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32; scales by offset + weight."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (scaled * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def added_norm(
    x: Float[Array, "T D"], out: Float[Array, "T D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """Return x + out, and its norm."""
    total = x + out
    return total, rms_norm(total, weight, eps, offset)


@runtime_checkable  # so that tests can check annotations
class Norm(Protocol):
    """The function `rms_norm`, or another that does the same."""

    def __call__(
        self, x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
    ) -> Float[Array, "*B D"]: ...


@runtime_checkable
class AddedNorm(Protocol):
    """The function `added_norm`, or another that does the same."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        out: Float[Array, "T D"],
        weight: Float[Array, " D"],
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]: ...


@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms of a layer."""

    norm: Norm
    added_norm: AddedNorm


PLAIN_NORMS = Norms(rms_norm, added_norm)


def rotate(x: Float[Array, "T heads H"], rope: Float[Array, "T rope"]) -> Float[Array, "T heads H"]:
    """Rotate the first 2 * half dimensions of each head, paired first half with second (Su et al. 2021; GPT-NeoX order).

    `rope` has cos, then sin, of each token's angles.
    """
    cos, sin = jnp.split(rope[:, None], 2, axis=-1)
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    a, b, rest = x32[..., :half], x32[..., half : 2 * half], x[..., 2 * half :]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
