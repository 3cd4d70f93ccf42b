"""Quantised products in the library for CPUs (ops/cpu/quantised.cc), for int8 values with a scale for each channel."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.ops.cpu.library import Library
from sgl_jax.ops.grouped_matmul.native import by_tiles
from sgl_jax.ops.quantized_matmul import native
from sgl_jax.ops.quantized_matmul.api import Planes, QuantizedGroupedMatmul, QuantizedMatmul, Rounding

_MULTIPLE = 64  # numbers of a vector in the widest library; it divides the columns


def library_matmul(library: Library, live: Bool[Array, " T"] | None = None) -> QuantizedMatmul:
    """Return the product that takes the library, and plain XLA for what the library does not take. The library skips tokens
    that are not `live`: their results may be zeros."""
    return functools.partial(_library_matmul, library=library, live=live)


def library_grouped_matmul(library: Library) -> QuantizedGroupedMatmul:
    """Return the product of tiles of one group's rows each, in the library where it takes them."""
    return functools.partial(_library_grouped_matmul, library=library)


def _library_grouped_matmul(
    x: Float[Array, "M I"],
    w: Planes,
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    rounding: Rounding | None = None,
    *,
    library: Library,
) -> Float[Array, "M O"]:
    def product(rows: Float[Array, "m I"], group: Int[Array, ""]) -> Float[Array, "m O"]:
        matrix = jax.tree.map(lambda plane: plane[layer, group], w)
        return _library_matmul(rows, matrix, rounding, library=library)

    return by_tiles(x, group_sizes, w.values.shape[2], product)


def _library_matmul(
    x: Float[Array, "T I"],
    w: Planes,
    rounding: Rounding | None = None,
    out_dtype: DTypeLike | None = None,
    *,
    library: Library,
    live: Bool[Array, " T"] | None = None,
) -> Float[Array, "T O"]:
    out, floats = jnp.dtype(out_dtype or x.dtype), (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    by_channel = w.values.dtype == jnp.int8 and w.scales.shape[1] == 1 and w.offsets is None
    takes = by_channel and rounding in ("int8", None) and x.dtype in floats and out in (x.dtype, jnp.float32)
    if not takes or x.shape[1] % _MULTIPLE:
        return native.quantized_matmul(x, w, rounding, out_dtype)
    call = jax.ffi.ffi_call(library.quantised, jax.ShapeDtypeStruct((len(x), len(w.values)), out))
    live = jnp.ones(len(x), bool) if live is None else live
    return call(x, w.values, w.scales, live, rounded=rounding is not None)
