"""Descriptions of weights before there is data for them, and names of the products that weights take part in."""

import dataclasses
import math
from typing import Literal, Self, get_args

import jax.numpy as jnp

# A dense product, by the path of its matrix in a layer's weights; the head is "lm_head", tied or not,
# and "fc" joins the features of a draft model.
AttentionSite = Literal["qkv", "o", "mla.q", "mla.q_down", "mla.q_up", "mla.kv_down"]
MlpSite = Literal["gate_up", "down", "moe.router", "moe.shared_gate_up", "moe.shared_down", "moe.shared_gate"]
Site = Literal[AttentionSite, MlpSite, "lm_head", "fc"]
ExpertSite = Literal["moe.experts.gate_up", "moe.experts.down"]  # one matrix for each expert
SITES: dict[str, Site | ExpertSite] = {site: site for site in get_args(Site) + get_args(ExpertSite)}


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """Shape, logical axes and dtype of one array. A leaf of the declared tree."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, which parallel/ maps to the mesh
    dtype: str  # "bfloat16", "int4"
    parts: tuple[int, ...] = ()  # output rows of each of the matrices that are fused in it; empty: it is one matrix
    unit: int = 1  # rows that stay together when a part is divided over devices: a head
    column_unit: int = 1  # columns that stay together when the columns are divided: a group with one scale

    @property
    def rows_axis(self) -> int:
        """Axis of the output rows, which `parts` divides. The axis of experts comes before it."""
        return 1 if self.axes[0] == "experts" else 0

    @property
    def num_experts(self) -> int | None:
        return self.shape[0] if self.rows_axis else None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) - self.rows_axis == 2

    @property
    def piece_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored tensors that make up the weight: its parts, for each expert in turn."""
        rows, *columns = self.shape[self.rows_axis :]
        return tuple((part, *columns) for part in self.parts or (rows,)) * (self.num_experts or 1)

    def stacked(self, n: int) -> Self:
        """Return the spec of a stack of n such arrays."""
        return dataclasses.replace(self, shape=(n, *self.shape), axes=(None, *self.axes))

    @property
    def nbytes(self) -> int:
        """Bytes on a device, which packs two int4 values in a byte."""
        return -(-math.prod(self.shape) * bits(self.dtype) // 8)


def bits(dtype: str) -> int:
    """Return the bits of one value."""
    kind = jnp.dtype(dtype)
    return jnp.iinfo(kind).bits if jnp.issubdtype(kind, jnp.integer) else jnp.finfo(kind).bits
