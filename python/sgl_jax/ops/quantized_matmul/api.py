"""The contract of products with quantised matrices: small numbers beside the scales that give them their size.

A matrix [O, I] has values of int8, int4 or an 8-bit float, and one scale for each output row and group of inputs:
w[o, i] = values[o, i] * scales[o, g] - offsets[o, g] with g = i // (I / G). With one group, the scale is the channel's.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Rounding = Literal[
    "int8", "float8_e4m3fn"
]  # to what the tokens of a product are rounded, with one scale for each token


class Planes(NamedTuple):
    """Arrays of one matrix, or of several behind leading axes B."""

    values: jax.Array  # [*B, O, I]
    scales: Float[Array, "*B O G"]
    offsets: Float[Array, "*B O G"] | None = None  # None: zeros


@runtime_checkable  # so that tests can check annotations
class QuantizedMatmul(Protocol):
    """Multiplies each token with each row of the matrix. The result has x's dtype unless `out_dtype` names a wider one."""

    def __call__(
        self, x: Float[Array, "T I"], w: Planes, rounding: Rounding | None = None, out_dtype: DTypeLike | None = None
    ) -> Float[Array, "T O"]: ...


@runtime_checkable
class QuantizedGroupedMatmul(Protocol):
    """Multiplies each row with its group's matrix, see grouped_matmul.api.GroupedMatmul; planes are [L, E, O, …]."""

    def __call__(
        self,
        x: Float[Array, "M I"],
        w: Planes,
        layer: Int[Array, ""] | int,
        group_sizes: Int[Array, " E"],
        rounding: Rounding | None = None,
    ) -> Float[Array, "M O"]: ...
