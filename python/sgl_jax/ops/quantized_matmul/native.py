"""Quantised products in plain XLA. A channel's scale multiplies the finished product; groups are dequantised before it."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from sgl_jax.ops.dense.api import plain_product
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.quantized_matmul.api import Planes, Rounding

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def quantized_matmul(
    x: Float[Array, "T I"], w: Planes, rounding: Rounding | None = None, out_dtype: DTypeLike | None = None
) -> Float[Array, "T O"]:
    """See api.QuantizedMatmul. Tokens and values of one dtype are multiplied in it, others in x's."""
    out_dtype = out_dtype or x.dtype
    by_channel = w.scales.shape[-1] == 1 and w.offsets is None
    if rounding and by_channel and w.values.dtype == rounding:
        values, sizes = rounded(x, rounding)
        sums = jnp.einsum("oi,ti->ot", w.values, values, preferred_element_type=sum_dtype(rounding))
        return (sums.astype(jnp.float32) * w.scales * sizes.T).T.astype(out_dtype)
    x = as_rounded(x, rounding)
    if not by_channel:
        return plain_product(x, dequantized(w).astype(x.dtype), out_dtype)
    return (plain_product(x, w.values.astype(x.dtype), jnp.float32) * w.scales[:, 0]).astype(out_dtype)


def quantized_grouped_matmul(
    x: Float[Array, "M I"],
    w: Planes,
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    rounding: Rounding | None = None,
    *,
    grouped_matmul: GroupedMatmul,
) -> Float[Array, "M O"]:
    """See api.QuantizedGroupedMatmul. Only this layer's matrices are dequantised."""
    x = as_rounded(x, rounding)
    matrices = dequantized(jax.tree.map(lambda plane: plane[layer][None], w)).astype(x.dtype)
    return grouped_matmul(x, matrices, 0, group_sizes)


def dequantized(w: Planes) -> Float[Array, "*B O I"]:
    """Return the matrix that the planes stand for, float32."""
    groups = w.values.astype(jnp.float32).reshape(*w.scales.shape, -1) * w.scales[..., None]
    if w.offsets is not None:
        groups -= w.offsets[..., None]
    return groups.reshape(w.values.shape)


def as_rounded(x: Float[Array, "T I"], to: Rounding | None) -> Float[Array, "T I"]:
    """Return what is left of the tokens when they have been rounded, in their own dtype."""
    if to is None:
        return x
    values, scales = rounded(x, to)
    return (values.astype(jnp.float32) * scales).astype(x.dtype)


def rounded(x: Float[Array, "T I"], to: Rounding) -> tuple[Shaped[Array, "T I"], Float[Array, "T 1"]]:
    """Round each token with the scale that takes its largest value to that of the dtype. Returns values and scales."""
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1, keepdims=True)
    scales = jnp.where(largest == 0, 1, largest) / _LARGEST[to]
    values = wide / scales
    return (jnp.round(values) if to == "int8" else values).astype(to), scales


def sum_dtype(rounding: Rounding) -> DTypeLike:
    """Return the dtype in which products of two values of this dtype are added up."""
    return jnp.int32 if rounding == "int8" else jnp.float32
