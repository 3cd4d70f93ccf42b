"""Grouped matmul for TPU: reads the matrices where they lie in the stack, each group's once for every tile of its rows.

Work is a list of items, one for each pair of a row tile and a group with rows in it. A tile with rows of several groups is
multiplied with the matrix of each, and keeps the group's own rows of each product. A group without rows has no item, so its
matrix is not read. The idea of group metadata is megablocks' (Gale et al. 2022, https://arxiv.org/abs/2211.15841).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_WEIGHT_BYTES = 4 << 20  # bytes of one block of a matrix; two are in VMEM, one at work and one on its way
_LANES = 128
_SMALLEST_TILE, _LARGEST_TILE = 16, 128  # rows


class Items(NamedTuple):
    """Work items in the order of rows; those past the last real one repeat it, so that nothing is copied for them."""

    number: jax.Array  # i32[1]
    row_tile: jax.Array  # i32[W]
    group: jax.Array  # i32[W]
    start: jax.Array  # i32[E]: first row of each group
    end: jax.Array  # i32[E]


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "L E O I"], layer: Int[Array, ""] | int, group_sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """See api.GroupedMatmul.

    Where I does not fill lane tiles, a device keeps the matrices with O innermost; the kernel then takes them so, and
    nothing is copied.
    """
    num_rows, inputs = x.shape
    num_groups, outputs = w.shape[1:3]
    rows = tile_rows(num_rows, num_groups)
    block = _output_block(outputs, inputs * w.dtype.itemsize)
    padded = jnp.pad(x, ((0, -num_rows % rows), (0, 0)))
    items = make_items(group_sizes, len(padded) // rows, rows)
    at = jnp.asarray(layer, jnp.int32).reshape(1)
    transposed = inputs % _LANES != 0
    if transposed:
        w = w.swapaxes(2, 3)

    def matrix_block(o, i, layer, _number, _row_tile, group, *_):
        return layer[0], group[i], *((0, o) if transposed else (o, 0))

    w_block = (inputs, block) if transposed else (block, inputs)
    w_spec = pl.BlockSpec((None, None, *w_block), matrix_block)
    read = min(num_groups, num_rows) * outputs * inputs * w.dtype.itemsize
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, contracted=0 if transposed else 1),
        out_shape=jax.ShapeDtypeStruct((len(padded), outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items),
            grid=(outputs // block, len(items.group)),
            in_specs=[pl.BlockSpec((rows, inputs), lambda o, i, layer, n, row_tile, *_: (row_tile[i], 0)), w_spec],
            out_specs=pl.BlockSpec((rows, block), lambda o, i, layer, n, row_tile, *_: (row_tile[i], o)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(items.group) * rows * inputs * outputs,
            transcendentals=0,
            bytes_accessed=read + (len(padded) * (inputs + outputs)) * x.dtype.itemsize,
        ),
        name="grouped_matmul",
    )(at, *items, padded, w)
    return out[:num_rows]


def make_items(group_sizes: Int[Array, " E"], num_tiles: int, rows: int) -> Items:
    """List the items: at most one for each row tile, and one more for each further group."""
    num_groups = len(group_sizes)
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    start = end - group_sizes
    first_tile = start // rows
    tiles = jnp.where(group_sizes > 0, -(-end // rows) - first_tile, 0)
    items_end = jnp.cumsum(tiles, dtype=jnp.int32)
    number = items_end[-1]
    item = jnp.minimum(jnp.arange(num_tiles + num_groups - 1, dtype=jnp.int32), jnp.maximum(number - 1, 0))
    group = jnp.searchsorted(items_end, item, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    row_tile = first_tile[group] + item - (items_end[group] - tiles[group])
    return Items(number.reshape(1), jnp.clip(row_tile, 0, num_tiles - 1), group, start, end)


def _kernel(layer, number, row_tile, group, start, end, x, w, out, *, rows: int, contracted: int):
    """Multiply the rows of an item, x [rows, I], with w [block, I] or [I, block] of its group into out [rows, block]. The
    grid walks all items for each block."""
    del layer
    item = pl.program_id(1)

    @pl.when(item < number[0])
    def _():
        product = lax.dot_general(x[...], w[...], (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
        row = row_tile[item] * rows + lax.broadcasted_iota(jnp.int32, product.shape, 0)
        own = (row >= start[group[item]]) & (row < end[group[item]])
        is_first = (item == 0) | (row_tile[item] != row_tile[jnp.maximum(item - 1, 0)])
        others = jnp.where(is_first, 0.0, out[...].astype(jnp.float32))
        out[...] = jnp.where(own, product, others).astype(out.dtype)


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Return about twice the rows of a group: a larger tile has rows of many groups, and is multiplied with each matrix."""
    wanted = pl.next_power_of_2(max(1, 2 * num_rows // num_groups))
    return max(_SMALLEST_TILE, min(_LARGEST_TILE, wanted, pl.next_power_of_2(num_rows)))


def _output_block(outputs: int, row_bytes: int) -> int:
    """Return the output columns of a block: a divisor in whole lane tiles that keeps a block of the matrix small."""
    blocks = [n for n in range(_LANES, outputs, _LANES) if outputs % n == 0 and n * row_bytes <= _WEIGHT_BYTES]
    return max(blocks, default=outputs if outputs * row_bytes <= _WEIGHT_BYTES or outputs % _LANES else _LANES)
