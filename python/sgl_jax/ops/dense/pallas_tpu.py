"""Products of many tokens on TPU: all tokens lie in VMEM, and the matrix passes through it once.

XLA divides such a product in blocks whose tokens it reads again for each block of the matrix, or in a few large ones, of which
the first is read and the last written while nothing is multiplied. Here a block of the matrix is multiplied with all tokens while
the next one is read. The activation of gate and up is applied to each block, so that only its result is written.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sgl_jax.ops.dense.api import Gated, plain_product

_LEAST_TOKENS = 1024  # fewer are multiplied in less time than the matrix is read in, and XLA reads it ahead
_LEAST_PIECE = 512  # tokens, where not all fit
_LEAST_SIDE = 1024  # fewest rows and fewest columns of a matrix
_LANES, _SUBLANES = 128, 16  # sides of a tile of bfloat16
_COLUMNS = 256  # columns of a matrix unit; the rows of a block are a multiple
_CHUNK, _LEAST_CHUNK = 512, 256  # tokens that are multiplied at once; between chunks the matrix units run empty
_BLOCK_BYTES = 4 << 20  # most bytes of a block of the matrix, unless 256 rows have more
_LEAST_BLOCKS = 8  # the first block is read while nothing is multiplied
_OTHER_BYTES = 6 << 20  # VMEM for the compiler


class Blocks(NamedTuple):
    tokens: int  # multiplied with a matrix that is read once; a divisor of all
    rows: int  # a block of the matrix has
    chunk: int  # tokens that are multiplied at once; a divisor of `tokens`


def product(x: Float[Array, "T I"], w: Float[Array, "O I"], out_dtype: DTypeLike | None = None) -> Float[Array, "T O"]:
    """See api.DenseProduct. Few tokens, small matrices and numbers other than bfloat16 are left to XLA."""
    blocks = blocks_for(x, w[None], out_dtype)
    if blocks is None:
        return plain_product(x, w, out_dtype)
    return multiply(x, w[None], unchanged, blocks, "dense_product")


def gated_product(x: Float[Array, "T D"], gate_up: Float[Array, "F2 D"], gated: Gated) -> Float[Array, "T F"] | None:
    """See api.GatedProduct. Returns None for what `product` leaves to XLA."""
    halves = gate_up.reshape(2, -1, x.shape[1])
    blocks = blocks_for(x, halves, None)
    return None if blocks is None else multiply(x, halves, rounded(gated, x.dtype), blocks, "dense_gated")


def unchanged(out: jax.Array) -> jax.Array:
    return out


def rounded(gated: Gated, dtype: DTypeLike) -> Gated:
    """Return the activation, of gate and up rounded to `dtype` as if they had been stored."""
    return lambda gate, up: gated(gate.astype(dtype).astype(gate.dtype), up.astype(dtype).astype(up.dtype))


def blocks_for(x: Float[Array, "T I"], w: Float[Array, "m O I"], out_dtype: DTypeLike | None) -> Blocks | None:
    """Return the sizes for this chip: as many tokens as fit into three quarters of VMEM. None: XLA is better."""
    (tokens, inputs), outputs = x.shape, w.shape[1]
    bfloat16 = {x.dtype, w.dtype, jnp.dtype(out_dtype or x.dtype)} == {jnp.dtype("bfloat16")}
    if (
        not bfloat16
        or tokens < _LEAST_TOKENS
        or min(inputs, outputs) < _LEAST_SIDE
        or inputs % _LANES
        or outputs % _LANES
    ):
        return None
    row_bytes = len(w) * inputs * w.dtype.itemsize
    most = min(_BLOCK_BYTES // row_bytes, outputs // _LEAST_BLOCKS)
    rows = max(_COLUMNS, most // _COLUMNS * _COLUMNS)
    room = pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4
    for pieces in range(1, tokens // _LEAST_PIECE + 1):
        of_piece = tokens // pieces
        chunk = max((n for n in range(_SUBLANES, _CHUNK + 1, _SUBLANES) if of_piece % n == 0), default=0)
        blocks = Blocks(of_piece, rows, chunk)
        if tokens % pieces == 0 and chunk >= _LEAST_CHUNK and _vmem_bytes(blocks, x, w) <= room:
            return blocks
    return None


def _vmem_bytes(blocks: Blocks, x: Float[Array, "T I"], w: Float[Array, "m O I"]) -> int:
    """Return the VMEM for the tokens, for two blocks of each matrix and of the result, and for a chunk: its tokens if several
    matrices share them, its sums in float32, and two arrays of the activation."""
    tokens, rows, chunk = blocks
    row_bytes = x.shape[1] * x.dtype.itemsize
    copied = (tokens + 2 * len(w) * rows) * row_bytes + 2 * tokens * rows * x.dtype.itemsize
    return copied + (len(w) - 1) * chunk * row_bytes + (len(w) + 2) * chunk * rows * 4 + _OTHER_BYTES


def multiply(
    x: Float[Array, "T I"], w: Float[Array, "m O I"], finish: Callable[..., jax.Array], blocks: Blocks, name: str
) -> Float[Array, "T O"]:
    """Return finish(w[0] @ x[t], …) of each token, where `finish` takes float32. O need be no multiple of a block."""
    (tokens, inputs), (number, outputs, _) = x.shape, w.shape
    grid = tokens // blocks.tokens, pl.cdiv(outputs, blocks.rows)

    def matrix(m: int):
        return pl.BlockSpec((None, blocks.rows, inputs), lambda _, block: (m, block, 0))

    return pl.pallas_call(
        functools.partial(_kernel, finish=finish, chunk=blocks.chunk),
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), x.dtype),
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY), *map(matrix, range(number))],
        out_specs=pl.BlockSpec((blocks.tokens, blocks.rows), lambda piece, block: (piece, block)),
        scratch_shapes=[
            pltpu.VMEM((blocks.tokens, inputs), x.dtype),
            pltpu.SemaphoreType.DMA((blocks.tokens // blocks.chunk,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(blocks, x, w),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * inputs * number * outputs,
            transcendentals=0,
            bytes_accessed=(tokens * (inputs + outputs) + grid[0] * w.size) * x.dtype.itemsize,
        ),
        name=name,
    )(x, *[w] * number)


def _kernel(x, *refs, finish: Callable[..., jax.Array], chunk: int):
    """Multiply a piece's tokens with a block of each matrix. x: [T, I], in HBM; matrices: [rows, I]; out: [tokens, rows];
    scratch: the tokens [tokens, I]. The first block is multiplied while they arrive."""
    *matrices, out, tokens, arrived = refs
    is_first, start, chunks = pl.program_id(1) == 0, pl.program_id(0) * len(tokens), len(tokens) // chunk

    def copy(number):
        source, target = (pl.ds(pl.multiple_of(at + number * chunk, chunk), chunk) for at in (start, 0))
        return pltpu.make_async_copy(x.at[source], tokens.at[target], arrived.at[number])

    @pl.when(is_first)
    def _():
        for number in range(chunks):
            copy(number).start()

    def multiply(number, _):
        @pl.when(is_first)
        def _():
            copy(number).wait()

        rows = pl.ds(pl.multiple_of(number * chunk, chunk), chunk)
        sums = [
            lax.dot_general(tokens[rows], w[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            for w in matrices
        ]
        out[rows] = finish(*sums).astype(out.dtype)

    lax.fori_loop(0, chunks, multiply, None)
