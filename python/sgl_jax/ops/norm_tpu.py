"""RMS norm of many tokens on TPU in one pass, where XLA reads them three times: for their squares, their root and the result."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sgl_jax.ops import norm_rope
from sgl_jax.ops.norm_rope import Norms

_LEAST_TOKENS, _LEAST_WIDTH = 128, 1024  # smaller norms are part of the product behind them
_LANES, _SUBLANES = 128, 16  # sides of a tile of bfloat16
_BLOCK_BYTES = 1 << 20  # tokens in one block


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """See norm_rope.rms_norm, which does it for few tokens and for numbers other than bfloat16."""
    if not _takes(x):
        return norm_rope.rms_norm(x, weight, eps, offset)
    return _call((x,), weight, eps, offset)[0]


def added_norm(
    x: Float[Array, "T D"], out: Float[Array, "T D"], weight: Float[Array, " D"], eps: float, offset: float = 0.0
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """See norm_rope.added_norm, which likewise does the rest."""
    if not _takes(x):
        return norm_rope.added_norm(x, out, weight, eps, offset)
    total, normed = _call((x, out), weight, eps, offset)
    return total, normed


NORMS = Norms(rms_norm, added_norm)


def _takes(x: jax.Array) -> bool:
    tokens, width = x.shape if x.ndim == 2 else (0, 0)
    is_large = tokens >= _LEAST_TOKENS and width >= _LEAST_WIDTH
    return x.dtype == jnp.bfloat16 and is_large and tokens % _SUBLANES == 0 and width % _LANES == 0


def _call(
    addends: tuple[jax.Array, ...], weight: Float[Array, " D"], eps: float, offset: float
) -> tuple[jax.Array, ...]:
    """Return the sum, if there are two addends, and its norm."""
    tokens, width = addends[0].shape
    rows = min(tokens, max(1, _BLOCK_BYTES // (width * 2 * _SUBLANES)) * _SUBLANES)
    tile = pl.BlockSpec((rows, width), lambda block: (block, 0))
    number = len(addends)  # arrays that are read, and as many that are written
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        out_shape=[jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)] * number,
        grid=(pl.cdiv(tokens, rows),),
        in_specs=[pl.BlockSpec((1, width), lambda block: (0, 0)), *[tile] * number],
        out_specs=[tile] * number,
        cost_estimate=pl.CostEstimate(
            flops=5 * tokens * width, transcendentals=tokens, bytes_accessed=4 * number * tokens * width
        ),
        name="dense_norm",
    )((weight.astype(jnp.float32) + offset)[None], *addends)


def _kernel(factors, *refs, eps: float):
    """Add and norm a block's tokens, 16 at a time: a row of tiles. factors: [1, D]; each of the addends, and of the
    outputs: [rows, D]."""
    addends, (*totals, normed) = refs[: len(refs) // 2], refs[len(refs) // 2 :]

    def norm(turn, _):
        rows = pl.ds(pl.multiple_of(turn * _SUBLANES, _SUBLANES), _SUBLANES)
        x32 = addends[0][rows].astype(jnp.float32)
        for addend, total in zip(addends[1:], totals, strict=True):
            rounded = (x32 + addend[rows].astype(jnp.float32)).astype(normed.dtype)
            total[rows], x32 = rounded, rounded.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        normed[rows] = (x32 * scale * factors[...]).astype(normed.dtype)

    lax.fori_loop(0, len(normed) // _SUBLANES, norm, None)
