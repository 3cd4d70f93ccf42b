"""Quantised products for TPU: values are read in their narrow dtype, and are wide in the core's own memory only.

Work is a list of items as in grouped_matmul.pallas_tpu; a dense product is that of one group. A step of the grid has a block
of outputs with all their inputs, which Pallas copies while the block before is multiplied (see tiles).
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
from jaxtyping import Array, Float, Int

from sgl_jax.ops.grouped_matmul.pallas_tpu import Items, make_items, tile_rows
from sgl_jax.ops.quantized_matmul import native, tiles
from sgl_jax.ops.quantized_matmul.api import Planes, Rounding
from sgl_jax.ops.quantized_matmul.tiles import LANES

_BLOCK_BYTES = 2 << 20  # a block's values; two blocks are in VMEM, one at work and one on its way
_TOKEN_BYTES = 12 << 20  # a tile of tokens of a dense product
_MOST_TOKENS = 1024  # in such a tile
_SUBLANES = 16  # tokens of bfloat16 in a register
_WORK_BYTES = 12 << 20  # VMEM for what a step decodes

Index = Callable[[jax.Array, jax.Array, tuple[jax.Array, jax.Array]], tuple[jax.Array | int, ...]]


class Tokens(NamedTuple):
    x: jax.Array  # [M, I]
    sums: jax.Array | None  # f32[M, G] of each group's inputs, where there are offsets


def quantized_matmul(
    x: Float[Array, "T I"], w: Planes, rounding: Rounding | None = None, out_dtype: DTypeLike | None = None
) -> Float[Array, "T O"]:
    """See api.QuantizedMatmul. With one scale for a channel it is left to XLA, which reads narrow values in place, too."""
    if w.scales.shape[-1] == 1 and w.offsets is None:
        return native.quantized_matmul(x, w, rounding, out_dtype)
    most = min(_MOST_TOKENS, _TOKEN_BYTES // (x.shape[1] * x.dtype.itemsize))
    rows = min(_SUBLANES * pl.cdiv(len(x), _SUBLANES), max(_SUBLANES, most // LANES * LANES))
    sizes, stack = jnp.array([len(x)], jnp.int32), jax.tree.map(lambda plane: plane[None, None], w)
    return _product(native.as_rounded(x, rounding), stack, 0, sizes, rows, out_dtype or x.dtype, "quantized_matmul")


def quantized_grouped_matmul(
    x: Float[Array, "M I"],
    w: Planes,
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    rounding: Rounding | None = None,
) -> Float[Array, "M O"]:
    """See api.QuantizedGroupedMatmul."""
    rows = tile_rows(len(x), len(group_sizes))
    return _product(native.as_rounded(x, rounding), w, layer, group_sizes, rows, x.dtype, "quantized_grouped_matmul")


def _product(
    x: Float[Array, "M I"],
    w: Planes,
    layer: Int[Array, ""] | int,
    group_sizes: Int[Array, " E"],
    rows: int,
    out_dtype: DTypeLike,
    name: str,
) -> Float[Array, "M O"]:
    """Multiply rows of groups, `rows` at a time. Raises ValueError for groups of inputs that lie across lane tiles."""
    (num_rows, inputs), (_, num_groups, outputs, groups) = x.shape, w.scales.shape
    if inputs % LANES == 0 and LANES % (inputs // groups) and (inputs // groups) % LANES:
        raise ValueError(
            f"{inputs // groups} inputs share a scale; on TPU a group divides {LANES} inputs or is a multiple of them: "
            "hold the matrix with one scale for each channel"
        )
    padded = jnp.pad(x, ((0, -num_rows % rows), (0, 0)))
    sums = None if w.offsets is None else _sums(padded, groups)
    tokens, items = Tokens(padded, sums), make_items(group_sizes, len(padded) // rows, rows)
    row_bytes = inputs * _bits(w.values.dtype) // 8
    block = output_block(outputs, row_bytes)
    # With several groups, items that share a tile of rows follow each other in one block of the output.
    spec = functools.partial(_spec, tokens_first=num_groups == 1)
    turned = 0 if _is_upright(groups) else len(jax.tree.leaves(w)) - 1
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, tokens_first=num_groups == 1),
        out_shape=jax.ShapeDtypeStruct((len(padded), outputs), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items),
            grid=(pl.cdiv(outputs, block), len(items.group))[:: -1 if num_groups == 1 else 1],
            in_specs=[
                jax.tree.map(lambda each: spec((rows, each.shape[1]), lambda _, tile, __: (tile, 0)), tokens),
                jax.tree.map(lambda each: spec(*_block_of(each, block)), w),
            ],
            out_specs=spec((rows, block), lambda o, tile, _: (tile, o)),
            scratch_shapes=[pltpu.VMEM((groups, block), jnp.float32)] * turned,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=_WORK_BYTES + 2 * block * row_bytes + rows * (2 * inputs * x.dtype.itemsize + 16 * block),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(items.group) * rows * inputs * outputs,
            transcendentals=0,
            bytes_accessed=min(num_groups, num_rows) * outputs * (row_bytes + 4 * groups)
            + len(padded) * (inputs + outputs) * x.dtype.itemsize,
        ),
        name=name,
    )(jnp.asarray(layer, jnp.int32).reshape(1), *items, tokens, jax.tree.map(_kept, w))
    return out[:num_rows]


def _kernel(layer, *refs, rows: int, tokens_first: bool):
    """Multiply the rows of an item, tokens [rows, I], with a block of its group's planes into out [rows, block]."""
    del layer
    items, (tokens, w, out, *turned) = Items(*refs[:5]), refs[5:]
    item = pl.program_id(0 if tokens_first else 1)

    @pl.when(item < items.number[0])
    def _():
        planes = list(w[1:])
        for at, scratch in enumerate(turned):  # scales, offsets
            scratch[...] = planes[at][...].T
            planes[at] = scratch
        group, tile = items.group[item], items.row_tile[item]
        row = tile * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        own = (row >= items.start[group]) & (row < items.end[group])
        is_first = (item == 0) | (tile != items.row_tile[jnp.maximum(item - 1, 0)])

        def store(columns, product):
            others = jnp.where(is_first, 0.0, out[:, columns].astype(jnp.float32))
            out[:, columns] = jnp.where(own, product, others).astype(out.dtype)

        tiles.multiply(tokens.x, tokens.sums, tiles.Block(w.values, *planes), store)


def _sums(x: Float[Array, "M I"], groups: int) -> Float[Array, "M G"]:
    """Sum the inputs of each group in float32, by a product: a device would have to copy them to divide their axis."""
    group = jnp.arange(x.shape[1]) // (x.shape[1] // groups)
    members = (group[:, None] == jnp.arange(groups)).astype(x.dtype)
    return jnp.dot(x, members, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _spec(shape: tuple[int | None, ...], index: Index, *, tokens_first: bool) -> pl.BlockSpec:
    """Return blocks of an array, by `index` (block of outputs, tile of rows, layer and group); a grid's steps are pairs
    of a block of outputs and an item, or of an item and a block."""

    def at(a, b, layer, _number, row_tile, group, *_):
        o, item = (b, a) if tokens_first else (a, b)
        return index(o, row_tile[item], (layer[0], group[item]))

    return pl.BlockSpec(shape, at)


def _block_of(plane: jax.Array, outputs: int) -> tuple[tuple[int | None, ...], Index]:
    """Return the shape of a block of a plane [L, E, O, n] as it is kept, and its index."""
    if _is_upright(plane.shape[3]):
        return (None, None, plane.shape[3], outputs), lambda o, _, matrix: (*matrix, 0, o)
    return (None, None, outputs, plane.shape[3]), lambda o, _, matrix: (*matrix, o, 0)


def _kept(plane: jax.Array) -> jax.Array:
    """Return a plane [L, E, O, n] as a device keeps it, which copies nothing."""
    return plane.swapaxes(2, 3) if _is_upright(plane.shape[3]) else plane


def _is_upright(columns: int) -> bool:
    """Tell whether a device keeps an array [O, columns] with O innermost."""
    return columns % LANES != 0


def _bits(dtype: DTypeLike) -> int:
    return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def output_block(outputs: int, row_bytes: int) -> int:
    """Return the outputs of a block: as many as are small enough, and preferably whole products of them."""
    if outputs <= LANES:
        return outputs
    most = max(LANES, min(outputs, _BLOCK_BYTES // row_bytes)) // LANES
    return LANES * max(range(1, most + 1), key=lambda n: (outputs % (n * LANES) == 0, n % 2 == 0, n))
