"""Weights on their devices: each one divided as its declaration says, layers in a list or stacked for a scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.share import Share, share_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import Weights, declare
from sgl_jax.parallel.placement import Axes, Placement


@dataclasses.dataclass(frozen=True)
class Placer:
    """Puts each weight on its devices as its declaration says. Only what this process's devices hold is asked for."""

    placement: Placement

    def shares(self, spec: WeightSpec) -> list[Share]:
        return [*self._devices_of_shares(spec)]

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> jax.Array:
        held = zip(self._devices_of_shares(spec).values(), arrays, strict=True)
        pieces = [jax.device_put(array, device) for devices, array in held for device in devices]
        shape = self.placement.whole_shape(arrays[0].shape, spec.axes)
        return jax.make_array_from_single_device_arrays(shape, self.placement.sharding(spec.axes), pieces)

    def _devices_of_shares(self, spec: WeightSpec) -> dict[Share, list[jax.Device]]:
        """The shards of this process's devices, and which devices hold each."""
        found: dict[Share, list[jax.Device]] = {}
        for number, device in enumerate(self.placement.mesh.devices.flat):
            if device.process_index == jax.process_index():
                found.setdefault(share_of(spec, self.placement.grid, number), []).append(device)
        return found


def abstract_weights(
    config: DecoderConfig, dtype: DTypeLike, placement: Placement, *, stacked: bool
) -> Weights[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the whole model's weights once they are placed, without any data."""

    def abstract(spec: WeightSpec) -> jax.ShapeDtypeStruct:
        shape = placement.whole_shape(spec.shape, spec.axes)
        return jax.ShapeDtypeStruct(shape, np.dtype(spec.dtype), sharding=placement.sharding(spec.axes))

    return jax.tree.map(abstract, declare(config.share(placement.grid), dtype, stacked=stacked))


def weight_axes(config: DecoderConfig, *, stacked: bool) -> Weights[Axes]:
    """The logical axes of each placed weight."""
    return jax.tree.map(lambda spec: spec.axes, declare(config, "float32", stacked=stacked))  # the same for any dtype


def weight_bytes(config: DecoderConfig, dtype: DTypeLike) -> int:
    """Bytes of a model's weights, or of one device's shard of them."""
    return sum(spec.nbytes for spec in jax.tree.leaves(declare(config, dtype)))


def stack_layers(
    weights: Weights[jax.Array], placement: Placement, declared: Weights[WeightSpec]
) -> Weights[jax.Array]:
    """Put each group's layers into one array [n, …] per weight, as `declared` has them stacked.

    One weight is stacked at a time, so that at most one is held twice.
    """
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
