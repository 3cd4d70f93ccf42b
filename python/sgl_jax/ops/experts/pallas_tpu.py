"""Routed experts for TPU, in two kernels that copy tokens within VMEM alone, and only to experts that are here.

The first one holds the tokens in VMEM. It gathers the rows of an expert there, multiplies them with gate and up, and applies
the activation. The second one multiplies with down, and adds each row to its token's sum, which lies in VMEM too. Work is a
list of items: up to `rows` tokens of one expert each. A device that holds a part of the experts has items for those only,
though the length of the list, which is static, allows for all. Matrices are read where they lie in the stack, once.

In VMEM a token is `D / 128` lines of 128 float32, one below the other, so that it is copied by a few whole registers. Line s
of all tokens of an item, read with a stride, is a tile of the product's operand.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from sgl_jax.ops.dense.api import Gated
from sgl_jax.ops.experts.api import LINE

_TOGETHER = 8  # tokens that are copied in one turn of a loop
_MOST_ROWS = 256  # an item has room for
_FEWEST_TOKENS = 256  # a piece has, unless it is all
_OTHER_BYTES = 4 << 20  # VMEM for the compiler
_ROUNDED = 16  # tokens whose sums are rounded in one turn of a loop: the rows of a bfloat16 tile
_SUM_BYTES = 16 << 20  # the tokens' sums in VMEM


class Items(NamedTuple):
    """Tokens of one expert each, in the order of experts. Those past the last real one have its expert and no tokens."""

    number: jax.Array  # i32[1]
    group: jax.Array  # i32[W]
    first: jax.Array  # i32[W]: among all pairs, sorted by expert
    count: jax.Array  # i32[W]


class Blocks(NamedTuple):
    """Sizes that depend on the chip's memories."""

    tokens: int  # in a piece, at most
    matrix_bytes: int  # in a block of a matrix, at most


class _Sizes(NamedTuple):
    rows: int  # each item has room for
    part: int  # rows that are multiplied together; all of an item where experts have as many
    lines: int  # a token has in VMEM: D / 128, or those of a block of the output
    items: int
    matrix_bytes: int
    pairs: int  # with an expert here, on average


def routed_experts(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "L E F2 D"],
    down: Float[Array, "L E D F"],
    layer: Int[Array, ""] | int,
    expert: Int[Array, "T X"],
    weights: Float[Array, "T X"],
    gated: Gated,
    num_experts: int,
    *,
    blocks: Blocks | None = None,
) -> Float[Array, "T D"] | None:
    """See api.RoutedExperts. Tokens that do not fit into VMEM together go in several pieces, each of which reads the matrices.
    `blocks`: other than those for the chip that the program is traced for (for tests)."""
    num_tokens, choices = expert.shape
    blocks = blocks or _blocks(x, gate_up, choices, _item_rows(num_tokens * choices, num_experts))
    if blocks is None:
        return None
    piece = pl.cdiv(num_tokens, pl.cdiv(num_tokens, blocks.tokens))
    of_piece = [slice(start, start + piece) for start in range(0, num_tokens, piece)]
    arguments = layer, num_experts, blocks.matrix_bytes, gated
    outs = [_experts(x[at], gate_up, down, expert[at], weights[at], *arguments) for at in of_piece]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs)


def _blocks(x: Float[Array, "T D"], gate_up: Float[Array, "L E F2 D"], choices: int, rows: int) -> Blocks | None:
    """Return the sizes for this chip: of VMEM a sixteenth is a block of a matrix, and tokens take what the first kernel leaves;
    two numbers of each pair are in scalar memory. None: matrices would be read for fewer than 256 tokens of more."""
    chip, width = pltpu.get_tpu_info(), x.shape[1]
    matrix_bytes = chip.vmem_capacity_bytes // 16
    block = _block(gate_up.shape[2] // 2, width * x.dtype.itemsize, matrix_bytes)
    left = chip.vmem_capacity_bytes * 7 // 8 - _first_bytes(block, width, rows, x.dtype.itemsize)
    tokens = min(left // (4 * width), chip.smem_capacity_bytes * 3 // 4 // (8 * choices))
    return Blocks(tokens, matrix_bytes) if tokens >= min(len(x), _FEWEST_TOKENS) else None


def _first_bytes(block: int, width: int, rows: int, itemsize: int) -> int:
    """Return the VMEM that the first kernel needs beside the tokens."""
    return 4 * block * width * itemsize + rows * (8 * width + 24 * block) + _OTHER_BYTES


def _experts(
    x, gate_up, down, expert, weights, layer, num_experts: int, matrix_bytes: int, gated: Gated
) -> Float[Array, "T D"]:
    held = gate_up.shape[1]
    order = jnp.argsort(expert.reshape(-1), stable=True)  # indices of choices, sorted by expert
    group_sizes = (expert.reshape(-1, 1) == jnp.arange(held)).sum(0, dtype=jnp.int32)
    rows = _item_rows(expert.size, num_experts)
    items = make_items(group_sizes, expert.size, rows)
    part = min(rows, _MOST_ROWS if expert.size >= _MOST_ROWS * num_experts else 128)
    lines, pairs = x.shape[1] // LINE, expert.size * held // num_experts
    sizes = _Sizes(rows, part, lines, len(items.group), matrix_bytes, pairs)
    scalars = jnp.asarray(layer, jnp.int32).reshape(1), *items
    token = order // expert.shape[1]
    padded = jnp.pad(token, (0, _TOGETHER))  # the last turn of a loop reads past an item's end
    h = _gate_and_up(x, gate_up, (*scalars, padded), sizes, gated)
    of_pair = weights.astype(jnp.float32).reshape(-1)[order]
    return _down(h, down, (*scalars, token, of_pair), sizes, len(x))


def make_items(group_sizes: Int[Array, " E"], num_pairs: int, rows: int) -> Items:
    """List the items. There are at most as many as full ones and one more for each group."""
    most = min(num_pairs // rows + len(group_sizes), num_pairs)
    shapes = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (1, most, most, most)]
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    made = pl.pallas_call(
        functools.partial(_items_kernel, rows=rows),
        out_shape=shapes,
        in_specs=[scalars],
        out_specs=[scalars] * len(shapes),
        name="items_of_experts",
    )(group_sizes)
    return Items(*made)


def _items_kernel(sizes, number, group, first, count, *, rows: int):
    """List the items in scalar memory, where it takes a few cycles each; as arrays it would be a dozen operations."""

    def add_group(at, before):
        item, start = before
        items = pl.cdiv(sizes[at], rows)

        def add(n, _):
            group[item + n] = at
            first[item + n] = start + n * rows
            count[item + n] = jnp.minimum(rows, sizes[at] - n * rows)

        lax.fori_loop(0, items, add, None)
        return item + items, start + sizes[at]

    found, _ = lax.fori_loop(0, len(sizes), add_group, (jnp.int32(0), jnp.int32(0)))
    number[0] = found

    def repeat(item, last):
        group[item], first[item], count[item] = last, 0, 0
        return last

    lax.fori_loop(found, len(group), repeat, jnp.where(found > 0, group[jnp.maximum(found - 1, 0)], 0))


def _item_rows(num_pairs: int, num_groups: int) -> int:
    """Return about twice the rows of an expert, of `num_groups`: most of them are one item then."""
    wanted = pl.next_power_of_2(max(1, 2 * num_pairs // num_groups))
    return max(16, min(_MOST_ROWS, wanted, pl.next_power_of_2(num_pairs)))


def _block(size: int, row_bytes: int, most_bytes: int) -> int:
    """Return a divisor of a matrix's rows, in whole lane tiles, of which a block has no more bytes; at least a tile."""
    blocks = [n for n in range(LINE, size + 1, LINE) if size % n == 0 and n * row_bytes <= most_bytes]
    return max(blocks, default=size if size % LINE else LINE)


def _groups_with_rows(num_groups: int, num_pairs: int) -> int:
    """Return how many groups have rows, on average, where pairs choose theirs at random: for the estimate of what is read."""
    return round(num_groups * (1 - (1 - 1 / num_groups) ** num_pairs))


def _gate_and_up(
    x: Float[Array, "T D"], w: Float[Array, "L E F2 D"], scalars: tuple[jax.Array, ...], sizes: _Sizes, gated: Gated
) -> Float[Array, "WR F"]:
    """Return gated(gate @ x, up @ x) of each item's tokens, an item's rows one below the other."""
    (num_tokens, width), (_, num_groups, both, _) = x.shape, w.shape
    neurons, rows = both // 2, sizes.rows
    block = _block(neurons, width * w.dtype.itemsize, sizes.matrix_bytes)
    blocks = neurons // block

    def matrix(half: int):
        def index(o, i, layer, number, group, *_):
            return layer[0], group[i], half * blocks + o, 0

        return pl.BlockSpec((None, None, block, width), index)

    matrices = _groups_with_rows(num_groups, sizes.pairs) * both * width * w.dtype.itemsize
    activations = num_tokens * width * 4 + sizes.pairs * neurons * x.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_gate_and_up_kernel, sizes=sizes, gated=gated),
        out_shape=jax.ShapeDtypeStruct((sizes.items * rows, neurons), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(blocks, sizes.items),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), matrix(0), matrix(1)],
            out_specs=pl.BlockSpec((rows, block), _item_block),
            scratch_shapes=[
                pltpu.VMEM((rows * sizes.lines, LINE), jnp.float32),
                pltpu.VMEM((sizes.part, width), x.dtype),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=4 * num_tokens * width + _first_bytes(block, width, rows, w.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sizes.pairs * both * width, transcendentals=0, bytes_accessed=matrices + activations
        ),
        name="experts_gate_up",
    )(*scalars, x.astype(jnp.float32).reshape(-1, LINE), w, w)


def _item_block(o, i, layer, number, *_):
    """Return the block of an item's rows. Items past the last one write nothing."""
    return jnp.minimum(i, jnp.maximum(number[0] - 1, 0)), o


def _gate_and_up_kernel(layer, number, group, first, count, token, x, gate, up, out, lines, gathered, *, sizes, gated):
    """Multiply an item's tokens. x: [T * lines, 128]; gate, up: [block, D]; out: [rows, block]; scratch: the tokens' lines
    [rows * lines, 128], and those of a part [part, D]."""
    del layer, group
    item, each, part_rows = pl.program_id(1), sizes.lines, sizes.part

    @pl.when(item < number[0])
    def _():
        def copy(turn, _):
            for n in range(_TOGETHER):
                row = turn * _TOGETHER + n
                lines[_lines(row, each), :] = x[_lines(token[first[item] + row], each), :]

        lax.fori_loop(0, pl.cdiv(count[item], _TOGETHER), copy, None)

        def multiply(part, _):
            start = part * part_rows
            for line in range(each):
                tile = lines[pl.ds(start * each + line, part_rows, stride=each), :]
                gathered[:, pl.ds(line * LINE, LINE)] = tile.astype(gathered.dtype)
            halves = (_dot(gathered[...], w[...], 1).astype(out.dtype).astype(jnp.float32) for w in (gate, up))
            out[pl.ds(pl.multiple_of(start, part_rows), part_rows), :] = gated(*halves).astype(out.dtype)

        lax.fori_loop(0, pl.cdiv(count[item], part_rows), multiply, None)


def _lines(token, each: int):
    return pl.ds(pl.multiple_of(token * each, each), each)


def _dot(x, w, contracted: int):
    return lax.dot_general(x, w, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)


def _down(
    h: Float[Array, "WR F"],
    w: Float[Array, "L E D F"],
    scalars: tuple[jax.Array, ...],
    sizes: _Sizes,
    num_tokens: int,
) -> Float[Array, "T D"]:
    """Return the weighed sum of each token's outputs, of h's dtype.

    Where F does not fill lane tiles, a device keeps the matrices with D innermost; the kernel then takes them so, and nothing
    is copied.
    """
    _, num_groups, width, neurons = w.shape
    row_bytes = neurons * w.dtype.itemsize
    transposed = neurons % LINE != 0
    if transposed:
        w = w.swapaxes(2, 3)
    padded = -(-num_tokens // _ROUNDED) * _ROUNDED
    block = _block(width, row_bytes, min(sizes.matrix_bytes, _SUM_BYTES // (4 * padded) * row_bytes))
    sizes = sizes._replace(lines=block // LINE)

    def matrix(o, i, layer, number, group, *_):
        return layer[0], group[i], *((0, o) if transposed else (o, 0))

    matrices = _groups_with_rows(num_groups, sizes.pairs) * width * row_bytes
    activations = num_tokens * width * h.dtype.itemsize + sizes.pairs * row_bytes
    sums_bytes = padded * block * (4 + 2 * h.dtype.itemsize)  # and two blocks of the output
    item_bytes = 2 * (block + sizes.rows) * row_bytes + 12 * sizes.rows * block
    out = pl.pallas_call(
        functools.partial(_down_kernel, sizes=sizes, contracted=0 if transposed else 1),
        out_shape=jax.ShapeDtypeStruct((padded, width), h.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(width // block, sizes.items),
            in_specs=[
                pl.BlockSpec((sizes.rows, neurons), lambda o, i, *scalars: _item_block(0, i, *scalars)),
                pl.BlockSpec((None, None, *((neurons, block) if transposed else (block, neurons))), matrix),
            ],
            out_specs=pl.BlockSpec((padded, block), lambda o, *_: (0, o)),
            scratch_shapes=[
                pltpu.VMEM((padded * sizes.lines, LINE), jnp.float32),
                pltpu.VMEM((sizes.part * sizes.lines, LINE), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=sums_bytes + item_bytes + _OTHER_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sizes.pairs * width * neurons, transcendentals=0, bytes_accessed=matrices + activations
        ),
        name="experts_down",
    )(*scalars, h, w)
    return out[:num_tokens]


def _down_kernel(layer, number, group, first, count, token, weight, h, w, out, sums, lines, *, sizes, contracted: int):
    """Multiply an item's rows, h [rows, F], with w [block, F] or [F, block], and add them to the sums of their tokens
    [T * lines, 128], which become out [T, block] with the last item. Scratch: the products of a part [part * lines, 128]."""
    del layer, group
    item, each, part_rows = pl.program_id(1), sizes.lines, sizes.part

    @pl.when(item == 0)
    def _():
        def clear(token, _):
            sums[_lines(token, each), :] = jnp.zeros((each, LINE), jnp.float32)

        lax.fori_loop(0, len(out), clear, None)

    def add(row, at, together: int):
        """Add the products of rows that are of different tokens: all sums are read before the first is written."""
        places = [_lines(token[at + n], each) for n in range(together)]
        new = [sums[place, :] + lines[_lines(row + n, each), :] * weight[at + n] for n, place in enumerate(places)]
        for place, value in zip(places, new, strict=True):
            sums[place, :] = value

    def multiply(part, _):
        start = pl.multiple_of(part * part_rows, part_rows)
        product = _dot(h[pl.ds(start, part_rows), :], w[...], contracted)
        for line in range(each):
            lines[pl.ds(line, part_rows, stride=each), :] = product[:, line * LINE : (line + 1) * LINE]
        rows, begin = jnp.minimum(part_rows, count[item] - start), first[item] + start
        turns = rows // _TOGETHER
        lax.fori_loop(0, turns, lambda n, _: add(n * _TOGETHER, begin + n * _TOGETHER, _TOGETHER), None)
        lax.fori_loop(turns * _TOGETHER, rows, lambda row, _: add(row, begin + row, 1), None)

    @pl.when(item < number[0])
    def _():
        lax.fori_loop(0, pl.cdiv(count[item], part_rows), multiply, None)

    @pl.when(item == pl.num_programs(1) - 1)
    def _():
        def round_sums(turn, _):
            start = turn * _ROUNDED
            for line in range(each):
                tile = sums[pl.ds(start * each + line, _ROUNDED, stride=each), :]
                rows = pl.ds(pl.multiple_of(start, _ROUNDED), _ROUNDED)
                out[rows, pl.ds(line * LINE, LINE)] = tile.astype(out.dtype)

        lax.fori_loop(0, len(out) // _ROUNDED, round_sums, None)
