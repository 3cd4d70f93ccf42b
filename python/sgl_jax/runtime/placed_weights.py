"""Weights on their devices: each one divided as its declaration says, layers in a list or stacked for a scan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.weights import Weights, WeightSpec, declare
from sgl_jax.parallel.placement import Placement, interleave


def place_weight(placement: Placement, spec: WeightSpec, array: np.ndarray) -> jax.Array:
    """One weight from the host to its devices."""
    if spec.parts:
        array = interleave(array, spec.parts, spec.unit, placement.tensor.size, axis=spec.rows_axis)
    return jax.device_put(array, placement.sharding(spec.axes))


def abstract_weights(config: DecoderConfig, dtype: Any, placement: Placement, *, stacked: bool) -> Weights:
    """What the weights of the whole model look like once placed, without there being any."""

    def abstract(spec: WeightSpec) -> jax.ShapeDtypeStruct:
        shape = placement.whole_shape(spec.shape, spec.axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(spec.axes))

    return jax.tree.map(abstract, declare(config.share(placement.tensor.size), stacked=stacked))


def weight_axes(config: DecoderConfig, *, stacked: bool) -> Weights:
    """The logical axes of each placed weight."""
    return jax.tree.map(lambda spec: spec.axes, declare(config, stacked=stacked))


def weight_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes of a model, or of one device's share of it."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare(config))) * itemsize


def stack_layers(weights: Weights, placement: Placement, config: DecoderConfig) -> Weights:
    """Put each group's layers into one array [n, …] per weight, a weight at a time: at most one is held twice."""
    layers = weights.layers
    assert isinstance(layers, list)
    groups = []
    for number, declared in zip(config.layer_groups(), declare(config, stacked=True).layers, strict=True):
        rows = [jax.tree.leaves(layer) for layer in layers[:number]]
        tree = jax.tree.structure(layers[0])
        del layers[:number]
        stacked = []
        for spec in jax.tree.leaves(declared):
            stack = jax.jit(jnp.stack, out_shardings=placement.sharding(spec.axes))
            stacked.append(stack([row.pop(0) for row in rows]))
        groups.append(jax.tree.unflatten(tree, stacked))
    return dataclasses.replace(weights, layers=tuple(groups))
