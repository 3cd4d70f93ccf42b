"""Masks of grammars on the device: a bit for each token of the vocabulary."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.parallel.grid import MeshAxis


def constrain(
    logits: Float[Array, "S V"], masks: Int[Array, "S words"], bound: Bool[Array, " S"], axis: MeshAxis
) -> Float[Array, "S V"]:
    """Return -inf for tokens that the mask of a `bound` line does not allow. The others are lifted to a finite number, so that
    one is sampled even where a bias of -inf holds back all of them. V is a shard of the vocabulary; masks are whole."""
    shard = logits.shape[-1]
    if masks.shape[-1] * 32 < shard:  # the launch takes no grammars
        return logits
    bits = ((masks[:, :, None] >> jnp.arange(32)) & 1).reshape(len(logits), -1)
    allowed = lax.dynamic_slice_in_dim(bits, axis.index() * shard, shard, axis=1) != 0
    masked = jnp.where(allowed, jnp.maximum(logits, jnp.finfo(logits.dtype).min), -jnp.inf)
    return jnp.where(bound[:, None], masked, logits)
