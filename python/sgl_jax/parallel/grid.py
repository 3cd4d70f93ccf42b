"""The grid of a launch's devices, and the collectives by which they exchange shards inside a step.

The mesh has two axes. Along `data` lie the ranks, each with requests and KV of its own; along `tensor` the devices of a
rank, over which its attention heads are divided. MLPs, experts and the vocabulary are divided over all devices, and
compute the tokens of all ranks. Experts may be kept whole in groups of devices (`expert`), which are these same devices.

A step runs on all devices at once (jax.shard_map), each on its own shards; only the functions here communicate. On one
device each of them is the identity, and nothing is wrapped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

DATA, TENSOR = "data", "tensor"  # axes of the mesh, the outer first


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """Axis of the mesh, or both axes as one, seen from one of its devices."""

    names: tuple[str, ...] = ()
    size: int = 1

    def index(self) -> jax.Array | int:
        return 0 if self.size == 1 else lax.axis_index(self.names)

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the sum of every device's x, on each of them."""
        return x if self.size == 1 else lax.psum(x, self.names)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.pmax(x, self.names)

    def concatenate(self, x: jax.Array) -> jax.Array:
        """Return every device's x, one after the other along the last axis, on each of them."""
        return x if self.size == 1 else lax.all_gather(x, self.names, axis=x.ndim - 1, tiled=True)

    def gather(self, x: jax.Array) -> jax.Array:
        """Return every device's x, one after the other along the first axis, on each of them."""
        return x if self.size == 1 else lax.all_gather(x, self.names, axis=0, tiled=True)

    def sum_scatter(self, x: jax.Array) -> jax.Array:
        """Sum every device's x, and keep this device's part of the first axis: the inverse of `gather`, with a sum."""
        return x if self.size == 1 else lax.psum_scatter(x, self.names, scatter_dimension=0, tiled=True)

    def own(self, x: jax.Array) -> jax.Array:
        """Return this device's part of the first axis of an x that is the same on every device."""
        if self.size == 1:
            return x
        part = x.shape[0] // self.size
        return lax.dynamic_slice_in_dim(x, self.index() * part, part)

    def mine(self, ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Translate ids into an axis that is divided in shards of `size`. Return their indices in this device's shard, with
        `size` for those of other devices, and a mask of those that are its own."""
        indices = ids - self.index() * size
        own = (indices >= 0) & (indices < size)
        return jnp.where(own, indices, size), own


ONE_DEVICE = MeshAxis()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Grid of `tensor` x `data` devices; `expert` is the number of groups that divide the experts.

    Between attention and MLP a device has the tokens of its rank, or with `sequence` its part of them. The sum of an
    output is then divided into a reduce-scatter behind the layer that made it and an all-gather before the next.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def num_devices(self) -> int:
        return self.tensor * self.data

    @property
    def flags(self) -> str:
        """The command-line flags that ask for this grid."""
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
        """The number of devices over which an expert's neurons are divided."""
        return self.num_devices // self.expert

    def part(self, axis: str | None, device: int) -> tuple[int, int]:
        """Return (i, n): the device holds part i of n of an array's axis with this logical name."""
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
        """Gather the rank's tokens, [T, …], from its devices' parts of them."""
        return self.tensor_axis.gather(x) if self.sequence else x

    def from_attention(self, x: jax.Array) -> jax.Array:
        """Sum the devices' partial outputs for the rank's tokens, [T, D], and keep the tokens that this device has."""
        return self.tensor_axis.sum_scatter(x) if self.sequence else self.tensor_axis.sum(x)

    def own_columns(self, x: jax.Array, copies: int) -> jax.Array:
        """Return this device's n / copies columns of an x [T, n] that `copies` neighbours on the tensor axis hold alike."""
        if copies == 1:
            return x
        columns = x.shape[-1] // copies
        return lax.dynamic_slice_in_dim(x, self.tensor_axis.index() % copies * columns, columns, axis=-1)

    def to_mlp(self, x: jax.Array) -> jax.Array:
        """Gather the tokens of all ranks, [M * T, …]."""
        return self.all_axes.gather(x) if self.sequence else self.data_axis.gather(x)

    def from_mlp(self, x: jax.Array) -> jax.Array:
        """Sum the devices' partial outputs for all ranks' tokens, [M * T, D], and keep the tokens that this device has."""
        if self.sequence:
            return self.all_axes.sum_scatter(x)
        return self.tensor_axis.sum(self.data_axis.sum_scatter(x))


LONE = Grid()
