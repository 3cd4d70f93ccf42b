"""The mesh axis `tensor`, seen from inside a step: each device holds its share of every matrix and of the vocabulary.

A step runs on all devices at once (jax.shard_map); what it computes is its own share, and these are the only places where
shares meet. On one device every function is the identity and nothing is wrapped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class TensorAxis:
    size: int = 1

    def index(self) -> jax.Array | int:
        return 0 if self.size == 1 else lax.axis_index(TENSOR)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of every device's x, on each of them."""
        return x if self.size == 1 else lax.psum(x, TENSOR)

    def once(self, x: jax.Array) -> jax.Array:
        """x on the first device, zeros on the others: a term of a sum over the devices that counts once."""
        return x if self.size == 1 else jnp.where(self.index() == 0, x, 0)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.pmax(x, TENSOR)

    def concatenate(self, x: jax.Array) -> jax.Array:
        """Every device's x, one after the other along the last axis, on each of them."""
        return x if self.size == 1 else lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True)

    def mine(self, ids: jax.Array, share: int) -> tuple[jax.Array, jax.Array]:
        """Of ids into an axis divided in shares: their places in this device's share, `share` if they lie elsewhere; and
        which are its own."""
        places = ids - self.index() * share
        own = (places >= 0) & (places < share)
        return jnp.where(own, places, share), own


ONE_DEVICE = TensorAxis()
