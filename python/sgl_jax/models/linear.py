"""Products of activations with weights: one function for every dense matrix, one for the experts' matrices.

Weights are [out, in]. The scheme of a quantised matrix multiplies it, with the kernel of the launch.
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sgl_jax.models.adapters import Adapted, SlotsInUse
from sgl_jax.models.quantised import Matrix, Quantised
from sgl_jax.models.spec import ExpertSite, Site
from sgl_jax.ops.adapter_addend import AdapterAddend, plain_addend
from sgl_jax.ops.dense.api import DenseProduct, Gated, GatedProduct, plain_product
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.kernels import Kernels
from sgl_jax.ops.quantized_matmul.api import QuantizedGroupedMatmul, QuantizedMatmul
from sgl_jax.ops.quantized_matmul.native import quantized_matmul


@runtime_checkable  # so that tests can check annotations
class GroupedLinear(Protocol):
    """The function `grouped_linear` with its products filled in."""

    def __call__(
        self,
        x: Float[Array, "M I"],
        w: Matrix[jax.Array],
        layer: Int[Array, ""] | int,
        group_sizes: Int[Array, " E"],
        *,
        site: ExpertSite,
    ) -> Float[Array, "M O"]: ...


@runtime_checkable
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
    quantised_product: QuantizedMatmul = quantized_matmul,
    addend: AdapterAddend = plain_addend,
    slots: SlotsInUse | None = None,
) -> Float[Array, "T O"]:
    """Multiply each token with the matrix of a site. The result has x's dtype unless `out_dtype` names a wider one. `slots`:
    the adapters of the tokens, in a launch that has any."""
    if isinstance(w, Adapted) and slots is not None:
        products = {"product": product, "quantised_product": quantised_product}
        out = linear(x, w.base, bias, site=site, out_dtype=out_dtype, **products)
        return addend(out, x, slots.at(site), w.factors.a, w.factors.b, w.num_slots)
    w = _fitting(w, x, site)
    if isinstance(w, Quantised):
        out = w.scheme.multiply(x, w, quantised_product, out_dtype)
    else:
        out = product(x, w.astype(x.dtype), out_dtype)
    return out if bias is None else out + bias.astype(out.dtype)


def gated_linear(
    x: Float[Array, "T D"],
    gate_up: Matrix[jax.Array] | None,
    bias: Float[Array, " FF"] | None,
    gated: Gated,
    product: GatedProduct,
    linear: Linear,
) -> Float[Array, "T F"]:
    """Return the activation of gate and up, in one operation where `product` takes the matrix."""
    if isinstance(gate_up, jax.Array) and bias is None and (gate_up.dtype, gate_up.shape[-1]) == (x.dtype, x.shape[-1]):
        out = product(x, gate_up, gated)
        if out is not None:
            return out
    return gated(*jnp.split(linear(x, gate_up, bias, site="gate_up"), 2, axis=-1))


def grouped_linear(
    x: Float[Array, "M I"],
    w: Matrix[jax.Array],
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    product: GroupedMatmul,
    quantised_product: QuantizedGroupedMatmul,
    *,
    site: ExpertSite,
) -> Float[Array, "M O"]:
    """Multiply each row with the matrix of its expert, see GroupedMatmul; the matrices of all layers are [L, E, O, I]."""
    w = _fitting(w, x, site)
    if isinstance(w, Quantised):
        return w.scheme.multiply_grouped(x, w, layer, group_sizes, quantised_product)
    if w.dtype != x.dtype:
        w, layer = w[layer][None].astype(x.dtype), 0
    return product(x, w, layer, group_sizes)


def products(kernels: Kernels, slots: SlotsInUse | None = None) -> tuple[Linear, GroupedLinear]:
    """Return both functions with the products of a launch, and the adapters of the tokens that they get."""
    return (
        functools.partial(
            linear,
            product=kernels.dense,
            quantised_product=kernels.quantized,
            addend=kernels.adapters,
            slots=slots,
        ),
        functools.partial(grouped_linear, product=kernels.grouped_matmul, quantised_product=kernels.quantized_grouped),
    )


def _fitting(w: Matrix[jax.Array] | None, x: Float[Array, "T I"], site: Site | ExpertSite) -> Matrix[jax.Array]:
    """Return the matrix. Raises ValueError for one that the model does not declare, or of another number of inputs."""
    if w is None:
        raise ValueError(f"{site}: the model declares no such matrix")
    if not isinstance(w, Quantised) and w.shape[-1] != x.shape[-1]:
        raise ValueError(f"{site}: the matrix is {list(w.shape)}; the activations have {x.shape[-1]} values")
    return w
