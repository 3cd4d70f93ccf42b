"""Weights on their devices: each one divided as its declaration says, layers in a list or stacked for a scan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.weights import LayerWeights, Weights, WeightSpec, declare
from sgl_jax.parallel.placement import Placement, interleave


def place_weight(placement: Placement, spec: WeightSpec, array: np.ndarray) -> jax.Array:
    """One weight from the host to its devices."""
    if spec.parts:
        array = interleave(array, spec.parts, spec.unit, placement.tensor.size)
    return jax.device_put(array, placement.sharding(spec.axes))


def abstract_weights(config: DecoderConfig, dtype: Any, placement: Placement, *, stacked: bool) -> Weights:
    """What the weights of the whole model look like once placed, without there being any."""
    specs = declare(config.share(placement.tensor.size))

    def abstract(spec: WeightSpec, layers: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        axes = (*(None for _ in layers), *spec.axes)
        shape = placement.whole_shape((*layers, *spec.shape), axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(axes))

    if not stacked:
        return jax.tree.map(abstract, specs)
    layer = jax.tree.map(lambda spec: abstract(spec, (config.num_layers,)), specs.layers[0])
    return dataclasses.replace(jax.tree.map(abstract, dataclasses.replace(specs, layers=[])), layers=layer)


def weight_axes(config: DecoderConfig, *, stacked: bool) -> Weights:
    """The logical axes of each placed weight."""
    axes = jax.tree.map(lambda spec: spec.axes, declare(config))
    if not stacked:
        return axes
    layer = jax.tree.map(lambda spec: (None, *spec.axes), declare(config).layers[0])
    return dataclasses.replace(axes, layers=layer)


def weight_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes of a model, or of one device's share of it."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare(config))) * itemsize


def stack_layers(weights: Weights, placement: Placement, config: DecoderConfig) -> Weights:
    """Put the L layers of each weight into one array [L, …], a weight at a time: at most one is held twice."""
    layers = weights.layers
    assert isinstance(layers, list)
    fields = {f.name: [getattr(layer, f.name) for layer in layers] for f in dataclasses.fields(layers[0])}
    layers.clear()
    axes = weight_axes(config, stacked=True).layers
    stacked = {}
    for name in list(fields):
        leaves = fields.pop(name)
        stacked[name] = None if leaves[0] is None else _stack(placement.sharding(getattr(axes, name)))(leaves)
    return dataclasses.replace(weights, layers=LayerWeights(**stacked))


def _stack(sharding: jax.sharding.Sharding) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(jnp.stack, out_shardings=sharding)
