"""Arrays that hold the adapters of a launch on its devices, and the program that puts an adapter into a slot."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models.adapters import AdapterRoom, Adapters, adapted_matrices, declare_adapters
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.lora_files import MatrixFactors
from sgl_jax.models.shard import rows_of_parts, shard_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import declare_plain
from sgl_jax.parallel.placement import Axes, Placement

_DEVICES = ("devices",)  # axes of an array with a part for each device
LOAD_ADAPTER = "load adapter"  # name of the program


@dataclasses.dataclass(frozen=True)
class AdapterArrays:
    """Forms of the slots' arrays and of a single adapter, which reaches a device as one vector."""

    model: DecoderConfig
    slots: AdapterRoom
    dtype: str
    placement: Placement
    stacked: bool

    def _declare(self, model: DecoderConfig, number: int, stacked: bool) -> Adapters[WeightSpec]:
        return declare_adapters(model, dataclasses.replace(self.slots, number=number), self.dtype, stacked=stacked)

    @functools.cached_property
    def _of_device(self) -> DecoderConfig:
        return self.model.shard(self.placement.grid)

    @property
    def axes(self) -> Adapters[Axes]:
        """Logical axes of each array of the slots."""
        return jax.tree.map(lambda spec: spec.axes, self._declare(self.model, self.slots.number, self.stacked))

    @property
    def abstract(self) -> Adapters[jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of the arrays of the slots."""

        def abstract(spec: WeightSpec) -> jax.ShapeDtypeStruct:
            shape = self.placement.whole_shape(spec.shape, spec.axes)
            return jax.ShapeDtypeStruct(shape, np.dtype(spec.dtype), sharding=self.placement.sharding(spec.axes))

        return jax.tree.map(abstract, self._declare(self._of_device, self.slots.number, self.stacked))

    @functools.cached_property
    def vector_size(self) -> int:
        """Values of an adapter on each device."""
        return sum(math.prod(spec.shape) for spec in jax.tree.leaves(self._declare(self._of_device, 1, self.stacked)))

    @property
    def abstract_vectors(self) -> jax.ShapeDtypeStruct:
        """Form of an adapter's vectors: those of all devices, one after the other."""
        size = self.placement.grid.num_devices * self.vector_size
        return jax.ShapeDtypeStruct((size,), np.dtype(self.dtype), sharding=self.placement.sharding(_DEVICES))

    def load(
        self, adapters: Adapters[jax.Array], slots: Int[Array, " one"], vector: Float[Array, " size"]
    ) -> tuple[Adapters[jax.Array]]:
        """Put an adapter into slots[0]: the body of the program, on each device."""
        specs, tree = jax.tree.flatten(self._declare(self._of_device, 1, self.stacked))
        ends = np.cumsum([math.prod(spec.shape) for spec in specs])[:-1]
        cut = jax.numpy.split(vector, ends)
        one = jax.tree.unflatten(tree, [piece.reshape(s.shape) for piece, s in zip(cut, specs, strict=True)])

        def put(array: jax.Array, piece: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(array, piece, slots[0] * piece.shape[-2], axis=-2)

        return (jax.tree.map(put, adapters, one),)

    def pack(self, factors: Mapping[str, MatrixFactors]) -> tuple[np.ndarray, ...]:
        """Return the vectors of this process's devices, for an adapter whose factors are given by paths of weights."""
        return tuple(self._pack(factors, number) for number, _ in self._own_devices())

    def place(self, vectors: tuple[np.ndarray, ...]) -> jax.Array:
        """Put the result of `pack` on the devices."""
        pieces = [jax.device_put(v, device) for v, (_, device) in zip(vectors, self._own_devices(), strict=True)]
        form = self.abstract_vectors
        return jax.make_array_from_single_device_arrays(form.shape, form.sharding, pieces)

    def _own_devices(self) -> Iterator[tuple[int, jax.Device]]:
        for number, device in enumerate(self.placement.mesh.devices.flat):
            if device.process_index == jax.process_index():
                yield number, device

    def _pack(self, factors: Mapping[str, MatrixFactors], device: int) -> np.ndarray:
        vector, rank, grid = np.zeros(self.vector_size, self.dtype), self.slots.rank, self.placement.grid
        at = 0

        def next_piece(shape: tuple[int, ...]) -> np.ndarray:
            nonlocal at
            start, at = at, at + math.prod(shape)
            return vector[start:at].reshape(shape)

        for paths, spec in self._matrices():
            shard, parts = shard_of(spec, grid, device), spec.parts or spec.shape[:1]
            assert shard.columns is not None
            for path in paths:
                piece = next_piece((len(parts), rank, len(shard.columns)))
                for i, a in enumerate(factors[path].a if path in factors else ()):
                    if a is not None:
                        piece[i, : len(a)] = a[:, shard.columns.start : shard.columns.stop]
            for i, rows in enumerate(rows_of_parts(spec, grid, device)):
                for path in paths:
                    piece = next_piece((rank, len(rows)))
                    if path in factors and (b := factors[path].b[i]) is not None:
                        piece[: b.shape[1]] = b[rows.start : rows.stop].T
        assert at == len(vector)
        return vector

    def _matrices(self) -> Iterator[tuple[list[str], WeightSpec]]:
        """Yield the adapted matrices in the order of a device's vector: the paths of those that are stacked, and their spec."""
        layers = declare_plain(self.model, self.dtype).layers
        sizes = self.model.layer_groups() if self.stacked else (1,) * len(layers)
        for first, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
            found = dict(adapted_matrices(layers[first], self.slots.sites))
            for site in sorted(found):
                yield [f".layers[{i}].{site}" for i in range(first, first + size)], found[site]


type ReadAdapter = Callable[[str], jax.Array]  # source -> the result of AdapterArrays.place
