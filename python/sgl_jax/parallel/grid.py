"""The devices of a launch and what they say to each other inside a step.

The mesh has two axes. Along `data` stand ranks, which have requests and KV of their own; along `tensor` the devices of a
rank, which share its attention heads. MLPs, experts and the vocabulary are divided over all devices: there the tokens of
all ranks meet. Experts may also be kept whole in groups of devices (`expert`), which are made of the same devices.

A step runs on all devices at once (jax.shard_map); what it computes is its own share, and these are the only places where
shares meet. On one device every function is the identity and nothing is wrapped.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

DATA, TENSOR = "data", "tensor"  # axes of the mesh, the outer first


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """An axis of the mesh, or both as one, seen from one of its devices."""

    names: tuple[str, ...] = ()
    size: int = 1

    def index(self) -> jax.Array | int:
        return 0 if self.size == 1 else lax.axis_index(self.names)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of every device's x, on each of them."""
        return x if self.size == 1 else lax.psum(x, self.names)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.pmax(x, self.names)

    def concatenate(self, x: jax.Array) -> jax.Array:
        """Every device's x, one after the other along the last axis, on each of them."""
        return x if self.size == 1 else lax.all_gather(x, self.names, axis=x.ndim - 1, tiled=True)

    def gather(self, x: jax.Array) -> jax.Array:
        """Every device's x, one below the other along the first axis, on each of them."""
        return x if self.size == 1 else lax.all_gather(x, self.names, axis=0, tiled=True)

    def sum_scatter(self, x: jax.Array) -> jax.Array:
        """Sum every device's x and keep this device's part of the first axis: undoes `gather`, and sums."""
        return x if self.size == 1 else lax.psum_scatter(x, self.names, scatter_dimension=0, tiled=True)

    def own(self, x: jax.Array) -> jax.Array:
        """This device's part of the first axis of an x that is the same on every device."""
        if self.size == 1:
            return x
        part = x.shape[0] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * part, part)

    def mine(self, ids: jax.Array, share: int) -> tuple[jax.Array, jax.Array]:
        """Find ids into an axis divided in shares: their places in this device's share, `share` if they lie elsewhere; and
        which are its own."""
        places = ids - self.index() * share
        own = (places >= 0) & (places < share)
        return jnp.where(own, places, share), own


ONE_DEVICE = MeshAxis()


@dataclasses.dataclass(frozen=True)
class Grid:
    """How many devices there are each way.

    Between attention and MLP a device has the tokens of its rank, or, with `sequence`, its part of them: summing what
    attention or MLP made is then half done where it is made and half where it is needed.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1  # groups of devices that the experts are spread over
    sequence: bool = False

    @property
    def num_devices(self) -> int:
        return self.tensor * self.data

    @property
    def flags(self) -> str:
        """As a user would ask for it."""
        others = (("--dp-size", self.data), ("--ep-size", self.expert))
        sizes = [f"--tp-size {self.tensor}", *(f"{flag} {size}" for flag, size in others if size > 1)]
        return " ".join([*sizes, "--enable-sequence-parallel"] if self.sequence else sizes)

    @functools.cached_property
    def tensor_axis(self) -> MeshAxis:
        return MeshAxis((TENSOR,), self.tensor)

    @functools.cached_property
    def data_axis(self) -> MeshAxis:
        return MeshAxis((DATA,), self.data)

    @functools.cached_property
    def all_axes(self) -> MeshAxis:
        return MeshAxis((DATA, TENSOR), self.num_devices)

    @property
    def expert_width(self) -> int:
        """Devices that share an expert's neurons."""
        return self.num_devices // self.expert

    def part(self, axis: str | None, device: int) -> tuple[int, int]:
        """(i, n): of an array's axis of this logical name the device holds the i-th of n parts."""
        match axis:
            case "heads" | "kv_heads":
                return device % self.tensor, self.tensor
            case "ffn" | "vocab":
                return device, self.num_devices
            case "experts":
                return device // self.expert_width, self.expert
            case "expert_ffn":
                return device % self.expert_width, self.expert_width
        return 0, 1

    def to_attention(self, x: jax.Array) -> jax.Array:
        """The rank's tokens, whole, from what a device has of them: [T, …]."""
        return self.tensor_axis.gather(x) if self.sequence else x

    def from_attention(self, x: jax.Array) -> jax.Array:
        """Sums the devices' shares of the rank's tokens, [T, D], and gives each device what it has of them."""
        return self.tensor_axis.sum_scatter(x) if self.sequence else self.tensor_axis.sum(x)

    def own_columns(self, x: jax.Array, copies: int) -> jax.Array:
        """Where neighbours on the tensor axis hold copies of an x [T, n], this device's of their n / copies columns."""
        if copies == 1:
            return x
        columns = x.shape[-1] // copies
        return lax.dynamic_slice_in_dim(x, self.tensor_axis.index() % copies * columns, columns, axis=-1)

    def to_mlp(self, x: jax.Array) -> jax.Array:
        """The tokens of all ranks: [M * T, …]."""
        return self.all_axes.gather(x) if self.sequence else self.data_axis.gather(x)

    def from_mlp(self, x: jax.Array) -> jax.Array:
        """Sums the devices' shares of all ranks' tokens, [M * T, D], and gives each device what it has of them."""
        if self.sequence:
            return self.all_axes.sum_scatter(x)
        return self.tensor_axis.sum(self.data_axis.sum_scatter(x))


LONE = Grid()
