"""Second leaf type of the weights: a matrix of small numbers, beside scales that give them their size.

A weight format says how files hold such matrices. A scheme says how devices do: which matrices are declared in it, how
stored tensors become its arrays, and how tokens are multiplied with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sgl_jax.models.formats.form import Form
from sgl_jax.models.spec import ExpertSite, Site, WeightSpec
from sgl_jax.models.stored import StoredTensor
from sgl_jax.ops.quantized_matmul.api import QuantizedGroupedMatmul, QuantizedMatmul


class WeightFormat(Protocol):
    """How the files of a checkpoint hold its matrices."""

    @property
    def form(self) -> Form: ...

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """Return a checkpoint's tensors with those of one matrix as one, under its name, with `planes`."""
        ...

    def skips(self, module: str) -> bool:
        """Tell whether config.json says that the matrix of a module is stored as plain floats."""
        ...


class Scheme(Protocol):
    """How devices hold matrices. Hashable, because it is a static part of every leaf it describes."""

    def declare(self, site: Site | ExpertSite, spec: WeightSpec) -> Matrix[WeightSpec]:
        """Return the planes of the matrix of a site, or the spec unchanged if the scheme exempts it."""
        ...

    def read(self, tensor: StoredTensor) -> Quantised[StoredTensor]:
        """Return the planes of a stored tensor as they are if they have this form, else those that its floats become."""
        ...

    def multiply(
        self, x: Float[Array, "T I"], w: Quantised[jax.Array], matmul: QuantizedMatmul, out_dtype: DTypeLike | None
    ) -> Float[Array, "T O"]:
        """Multiply each token with the matrix, by the kernel where it fits the format."""
        ...

    def multiply_grouped(
        self,
        x: Float[Array, "M I"],
        w: Quantised[jax.Array],
        layer: Int[Array, ""] | int,
        group_sizes: Int[Array, " E"],
        matmul: QuantizedGroupedMatmul,
    ) -> Float[Array, "M O"]:
        """Multiply each row with its expert's matrix of one layer, likewise."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised[Leaf]:
    """Matrix in a scheme. Its leaves may be all that a plain leaf may be: arrays, specs, stored tensors."""

    values: Leaf  # [*B, O, I], or as the scheme packs them
    scales: Leaf  # [*B, O, I / group]
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    offsets: Leaf | None = None  # like the scales; None: the format has none

    @property
    def planes(self) -> dict[str, Leaf]:
        """Its arrays, by name."""
        named = {"values": self.values, "scales": self.scales, "offsets": self.offsets}
        return {name: plane for name, plane in named.items() if plane is not None}


type Matrix[Leaf] = Leaf | Quantised[Leaf]


def is_quantised(x: object) -> bool:
    """Tell tree functions (`is_leaf`) to take a quantised matrix whole."""
    return isinstance(x, Quantised)
