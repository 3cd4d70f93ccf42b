"""Weights in the host's memory, from where they are put on the devices one by one, without anything being compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from sgl_jax.models.shard import Shard
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import Weights
from sgl_jax.parallel.placement import Axes
from sgl_jax.runtime.placed_weights import DevicePlacer


@dataclasses.dataclass(frozen=True)
class HostWeight:
    """Array of the tree of weights, as this process's shards of it; of a stack, those of each layer."""

    placer: DevicePlacer
    spec: WeightSpec  # one layer's
    layers: tuple[Sequence[np.ndarray], ...]
    axes: Axes  # with those of the stack

    def put(self) -> jax.Array:
        """Make the array on the devices. On a CPU it may be in the same memory."""
        stacked = len(self.axes) > len(self.spec.axes)
        arrays = [np.stack(each) for each in zip(*self.layers, strict=True)] if stacked else self.layers[0]
        return self.placer.place(self.spec, arrays, self.axes)


@dataclasses.dataclass(frozen=True)
class HostPlacer:
    """Keeps weights in the host's memory: a models.loader.Placer that reads what `placer` would."""

    placer: DevicePlacer

    def shards(self, spec: WeightSpec) -> Sequence[Shard]:
        return self.placer.shards(spec)

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> HostWeight:
        return HostWeight(self.placer, spec, (arrays,), spec.axes)


def stack_host_layers(weights: Weights[HostWeight], declared: Weights[WeightSpec]) -> Weights[HostWeight]:
    """Join the layers of each group as `declared` has them. They are stacked when they are put on the devices."""
    layers, groups = [*weights.layers], []
    for group in declared.layers:
        specs, tree = jax.tree.flatten(group)
        number = specs[0].shape[0]
        rows = zip(*map(jax.tree.leaves, layers[:number]), strict=True)
        stacks = zip(rows, specs, strict=True)
        groups.append(jax.tree.unflatten(tree, [_stack(each, spec.axes) for each, spec in stacks]))
        del layers[:number]
    return dataclasses.replace(weights, layers=tuple(groups))


def _stack(weights: Sequence[HostWeight], axes: Axes) -> HostWeight:
    return dataclasses.replace(weights[0], layers=tuple(each.layers[0] for each in weights), axes=axes)
