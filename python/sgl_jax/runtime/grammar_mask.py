"""Masks of grammars on the device: for each token of the vocabulary, whether it may come next."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.parallel.grid import MeshAxis


def unpacked(mask: Int[Array, " words"], shard: int, axis: MeshAxis) -> Bool[Array, " V"]:
    """Return this device's shard, V tokens, of a mask with a bit for each token of the vocabulary."""
    bits = ((mask[:, None] >> jnp.arange(32)) & 1).reshape(-1) != 0
    return lax.dynamic_slice_in_dim(bits, axis.index() * shard, shard)


def constrain(
    logits: Float[Array, "S V"], masks: Bool[Array, "R V"], rows: Int[Array, " S"], bound: Bool[Array, " S"]
) -> Float[Array, "S V"]:
    """Return -inf for tokens that the mask of a `bound` line's row does not allow. The others are lifted to a finite number, so
    that one is sampled even where a bias of -inf holds back all of them."""
    if masks.shape[-1] < logits.shape[-1]:  # the launch takes no grammars
        return logits
    masked = jnp.where(masks[rows], jnp.maximum(logits, jnp.finfo(logits.dtype).min), -jnp.inf)
    return jnp.where(bound[:, None], masked, logits)
