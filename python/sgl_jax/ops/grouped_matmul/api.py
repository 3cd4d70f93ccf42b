"""The contract of grouped matmul: rows sorted by group, a matrix for each group.

The matrices of all layers come in one array, and the layer as an index: a kernel then reads the layer's own matrices where
they are, while a slice of a stack handed to an opaque kernel would be copied in every step.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable  # so that tests can check annotations
class GroupedMatmul(Protocol):
    """Multiply each row with its group's matrix: out[m] = w[layer, group of row m] @ x[m]. The first group_sizes[0] rows are
    of group 0, and so on. Rows past the last group are padding; their output is unspecified."""

    def __call__(
        self,
        x: Float[Array, "M I"],
        w: Float[Array, "L E O I"],
        layer: Int[Array, ""] | int,
        group_sizes: Int[Array, " E"],
    ) -> Float[Array, "M O"]: ...
