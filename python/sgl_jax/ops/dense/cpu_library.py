"""Products of tokens with a matrix by the library for CPUs (cpu/dense.cc)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sgl_jax.ops.cpu.library import Library
from sgl_jax.ops.dense.api import DenseProduct, plain_product

_MOST_TOKENS = 64  # beyond, XLA's products are about as fast (benchmarks/LOG.md)
_MULTIPLE = 32  # numbers of a vector in the widest library; it divides the columns


def library_product(library: Library, live: Bool[Array, " T"] | None = None) -> DenseProduct:
    """Return the product that takes the library for few tokens, and plain XLA for what the library does not take. The library
    skips tokens that are not `live`: their results may be zeros."""
    return functools.partial(_library_product, library=library, live=live)


def _library_product(
    x: Float[Array, "T I"],
    w: Float[Array, "O I"],
    out_dtype: DTypeLike | None = None,
    *,
    library: Library,
    live: Bool[Array, " T"] | None,
) -> Float[Array, "T O"]:
    out = jnp.dtype(out_dtype or x.dtype)
    takes = {x.dtype, w.dtype} in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}) and out in (x.dtype, jnp.float32)
    if not takes or len(x) > _MOST_TOKENS or w.shape[1] % _MULTIPLE:
        return plain_product(x, w, out_dtype)
    live = jnp.ones(len(x), bool) if live is None else live
    return jax.ffi.ffi_call(library.dense, jax.ShapeDtypeStruct((len(x), len(w)), out))(x, w, live)
