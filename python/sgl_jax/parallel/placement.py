"""Devices of a model, and how its arrays are divided over them, by the logical names of their axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sgl_jax.parallel.grid import DATA, LONE, TENSOR, Grid

# Logical axis -> mesh axes. An axis not named here is whole on every device. The axis of experts holds each device's shard
# in turn, whichever experts and whichever part of their neurons it has.
RULES = {
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "pages": (DATA,),
    "ffn": (DATA, TENSOR),
    "vocab": (DATA, TENSOR),
    "experts": (DATA, TENSOR),
    "devices": (DATA, TENSOR),
}

Axes = tuple[str | None, ...]  # a logical name, or None, for each axis of an array


@dataclasses.dataclass(frozen=True)
class Placement:
    mesh: Mesh
    grid: Grid

    @classmethod
    def over(cls, devices: Sequence[jax.Device], grid: Grid = LONE) -> Placement:
        """Make a mesh of as many devices as the grid has; those of a tensor-parallel group are neighbours."""
        shape = (grid.data, grid.tensor)
        return cls(Mesh(np.array(devices).reshape(shape), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2), grid)

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        return NamedSharding(self.mesh, partition(axes))

    def whole_shape(self, shard: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """Return the shape of an array whose shard on each device has the shape `shard`."""
        sizes = [math.prod(self.mesh.shape[name] for name in RULES.get(axis or "", ())) for axis in axes]
        return tuple(n * size for n, size in zip(shard, sizes, strict=True))

    def run[R](self, function: Callable[..., R], in_axes: object, out_axes: object) -> Callable[..., R]:
        """Return `function` run on every device with its shards of the arguments; trees of Axes say how they are divided."""
        if self.grid.num_devices == 1:
            return function
        specs = functools.partial(jax.tree.map, partition, is_leaf=_is_axes)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
        )


def partition(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)
