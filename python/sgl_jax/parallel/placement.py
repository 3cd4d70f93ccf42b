"""Which devices a model runs on and how its arrays are divided over them, by the logical names of their axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sgl_jax.parallel.tensor import TENSOR, TensorAxis

# Logical axis -> mesh axis. An axis not named here is whole on every device.
RULES = {"heads": TENSOR, "kv_heads": TENSOR, "ffn": TENSOR, "vocab": TENSOR}

Axes = tuple[str | None, ...]  # a logical name, or None, for each axis of an array


@dataclasses.dataclass(frozen=True)
class Placement:
    mesh: Mesh

    @classmethod
    def over(cls, devices: Sequence[jax.Device]) -> Placement:
        """All devices in one tensor-parallel group."""
        return cls(Mesh(np.array(devices), (TENSOR,), axis_types=(AxisType.Auto,)))

    @property
    def tensor(self) -> TensorAxis:
        return TensorAxis(self.mesh.shape[TENSOR])

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        return NamedSharding(self.mesh, partition(axes))

    def whole_shape(self, share: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """The shape of an array of which each device holds a share of this shape."""
        size = self.tensor.size
        return tuple(n * (size if axis in RULES else 1) for n, axis in zip(share, axes, strict=True))

    def run(self, function: Any, in_axes: Any, out_axes: Any) -> Any:
        """`function` on every device with its shares of the arguments; trees of Axes say how they are divided."""
        if self.tensor.size == 1:
            return function
        specs = functools.partial(jax.tree.map, partition, is_leaf=_is_axes)
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
        )


def partition(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)


def interleave(array: np.ndarray, parts: Sequence[int], unit: int, size: int, axis: int = 0) -> np.ndarray:
    """Reorder rows (of `axis`) so that the i-th of `size` equal blocks holds the i-th share of every part.

    A part is divided in whole units of `unit` rows. A part with fewer units than shares repeats them: neighbours get the
    same one (KV heads when there are more devices than heads).
    """
    if size == 1:
        return array

    def share(part: np.ndarray, i: int) -> np.ndarray:
        rows = part.shape[axis]
        start = i * rows // size // unit * unit
        return part.take(range(start, start + max(rows // size, unit)), axis)

    pieces = np.split(array, np.cumsum(parts)[:-1], axis)
    return np.concatenate([share(part, i) for i in range(size) for part in pieces], axis)
