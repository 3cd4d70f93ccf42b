"""Products of activations with weights: one function for every dense matrix, one for the experts' matrices.

Weights are [out, in]. A quantised matrix is dequantised and then multiplied.
"""

from typing import Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sgl_jax.models.quantised import Matrix, Quantised
from sgl_jax.models.spec import ExpertSite, Site
from sgl_jax.ops.dense import DenseProduct, plain_product
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul


@runtime_checkable  # so that tests can check annotations
class Linear(Protocol):
    """The function `linear` with its product filled in."""

    def __call__(
        self,
        x: Float[Array, "T I"],
        w: Matrix[jax.Array] | None,
        bias: Float[Array, " O"] | None = None,
        *,
        site: Site,
        out_dtype: DTypeLike | None = None,
    ) -> Float[Array, "T O"]: ...


def linear(
    x: Float[Array, "T I"],
    w: Matrix[jax.Array] | None,
    bias: Float[Array, " O"] | None = None,
    *,
    site: Site,
    out_dtype: DTypeLike | None = None,
    product: DenseProduct = plain_product,
) -> Float[Array, "T O"]:
    """Multiply each token with the matrix of a site. The result has x's dtype unless `out_dtype` names a wider one."""
    out = product(x, _plain(w, x, site), out_dtype)
    return out if bias is None else out + bias.astype(out.dtype)


def grouped_linear(
    x: Float[Array, "M I"],
    w: Matrix[jax.Array],
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    grouped_matmul: GroupedMatmul,
    *,
    site: ExpertSite,
) -> Float[Array, "M O"]:
    """Multiply each row with the matrix of its expert, see GroupedMatmul; the matrices of all layers are [L, E, O, I].

    Only this layer's experts are dequantised.
    """
    if isinstance(w, Quantised) or w.dtype != x.dtype:
        w, layer = jax.tree.map(lambda leaf: leaf[layer][None], w), 0
    return grouped_matmul(x, _plain(w, x, site), layer, group_sizes)


def _plain(w: Matrix[jax.Array] | None, x: Float[Array, "T I"], site: Site | ExpertSite) -> Float[Array, "*B O I"]:
    """Return the matrix as floats of x's dtype."""
    if w is None:
        raise ValueError(f"{site}: the model declares no such matrix")
    matrix = w.scheme.dequantise(w) if isinstance(w, Quantised) else w
    if matrix.shape[-1] != x.shape[-1]:
        raise ValueError(f"{site}: the matrix is {list(matrix.shape)}; the activations have {x.shape[-1]} values")
    return matrix.astype(x.dtype)
