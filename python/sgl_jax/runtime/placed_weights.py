"""Placement of weights: each is sharded as its declaration says; layers are in a list, or stacked for a scan."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.shard import Shard, shard_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import Weights, declare
from sgl_jax.parallel.placement import Axes, Placement


@dataclasses.dataclass(frozen=True)
class DevicePlacer:
    """Puts each weight on its devices: the models.loader.Placer of a process, for the shards that its devices hold."""

    placement: Placement

    def shards(self, spec: WeightSpec) -> list[Shard]:
        """Return the shards that this process must read."""
        return [*self._devices_of_shards(spec)]

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray], axes: Axes | None = None) -> jax.Array:
        """Make a sharded weight of the arrays of `shards`, in their order. `axes`: those of the arrays, if not the spec's."""
        axes = spec.axes if axes is None else axes
        held = zip(self._devices_of_shards(spec).values(), arrays, strict=True)
        pieces = [jax.device_put(array, device) for devices, array in held for device in devices]
        shape = self.placement.whole_shape(arrays[0].shape, axes)
        return jax.make_array_from_single_device_arrays(shape, self.placement.sharding(axes), pieces)

    def _devices_of_shards(self, spec: WeightSpec) -> dict[Shard, list[jax.Device]]:
        """Map each shard of this process's devices to the devices that hold it."""
        found: dict[Shard, list[jax.Device]] = {}
        for number, device in enumerate(self.placement.mesh.devices.flat):
            if device.process_index == jax.process_index():
                found.setdefault(shard_of(spec, self.placement.grid, number), []).append(device)
        return found


def abstract_weights(
    config: DecoderConfig, dtype: DTypeLike, placement: Placement, *, stacked: bool
) -> Weights[jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings of the model's placed weights."""

    def abstract(spec: WeightSpec) -> jax.ShapeDtypeStruct:
        shape = placement.whole_shape(spec.shape, spec.axes)
        return jax.ShapeDtypeStruct(shape, np.dtype(spec.dtype), sharding=placement.sharding(spec.axes))

    return jax.tree.map(abstract, declare(config.shard(placement.grid), dtype, stacked=stacked))


def weight_axes(config: DecoderConfig, *, stacked: bool) -> Weights[Axes]:
    """Return the logical axes of each placed weight."""
    return jax.tree.map(lambda spec: spec.axes, declare(config, "float32", stacked=stacked))  # any dtype has the same


def weight_bytes(config: DecoderConfig, dtype: DTypeLike) -> int:
    """Return the bytes of a model's weights, or of one device's shards of them."""
    return sum(spec.nbytes for spec in jax.tree.leaves(declare(config, dtype)))


def stack_layers(
    weights: Weights[jax.Array], placement: Placement, declared: Weights[WeightSpec]
) -> Weights[jax.Array]:
    """Stack the layers of each group, one array [n, …] per weight, as `declared` has them. One weight is stacked at a time, so
    that at most one is in memory twice."""
    layers = weights.layers
    assert isinstance(layers, list)
    groups = []
    for group in declared.layers:
        number = jax.tree.leaves(group)[0].shape[0]
        rows = [jax.tree.leaves(layer) for layer in layers[:number]]
        tree = jax.tree.structure(layers[0])
        del layers[:number]
        stacked = []
        for spec in jax.tree.leaves(group):
            stack = jax.jit(jnp.stack, out_shardings=placement.sharding(spec.axes))
            stacked.append(stack([row.pop(0) for row in rows]))
        groups.append(jax.tree.unflatten(tree, stacked))
    return dataclasses.replace(weights, layers=tuple(groups))
