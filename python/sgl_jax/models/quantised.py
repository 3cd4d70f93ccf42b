"""Second leaf type of the weights: a matrix of small numbers, beside scales that give them their size.

A scheme says what the numbers of such a matrix mean. It has everything that is peculiar to a weight format: how files
hold it, which matrices are declared in it, how stored tensors become its arrays, and which matrix these stand for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
from jaxtyping import Array, Float

from sgl_jax.models.spec import ExpertSite, Site, WeightSpec
from sgl_jax.models.stored import StoredTensor


class Scheme(Protocol):
    """A weight format. Hashable, because it is a static part of every leaf it describes."""

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """Return a checkpoint's tensors with those of one matrix as one, under its name, with `planes`."""
        ...

    def declare(self, site: Site | ExpertSite, spec: WeightSpec) -> Matrix[WeightSpec]:
        """Return the matrix as this format stores it, or the spec unchanged if the format exempts it."""
        ...

    def read(self, tensor: StoredTensor) -> Quantised[StoredTensor]:
        """Return the planes of a stored tensor in this format, or those that its floats become in it."""
        ...

    def dequantise(self, w: Quantised[jax.Array]) -> Float[Array, "*B O I"]:
        """Return the matrix that the values and scales stand for, float32."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised[Leaf]:
    """Matrix in a scheme. Its leaves may be all that a plain leaf may be: arrays, specs, stored tensors."""

    values: Leaf  # [*B, O, I], or as the scheme packs them
    scales: Leaf  # [*B, O, I / group]
    scheme: Scheme = dataclasses.field(metadata={"static": True})


type Matrix[Leaf] = Leaf | Quantised[Leaf]


def is_quantised(x: object) -> bool:
    """Tell tree functions (`is_leaf`) to take a quantised matrix whole."""
    return isinstance(x, Quantised)
