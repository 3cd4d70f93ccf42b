"""Rows of more tokens than short ones: their K and V go to the pool first, then tiles of queries walk their rows' pages.

Tiles lie on fixed places of the packed tokens, so that q and o need no other layout than the matmuls around have; a tile
where rows meet is computed once for each of them. The kernel owns every token after those of the short rows: their
outputs, and zeros for padding. Without such rows it has nothing to do but zeros where decode has not put them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa import ring
from sgl_jax.ops.attention.fa.blocks import ChunkBlocks
from sgl_jax.ops.attention.fa.prepare import Operands, Prepare
from sgl_jax.ops.attention.fa.ring import PageRing, Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import FLOOR, LANES, Scalars, Scores, attend, join_pages, of_head, part_of, views
from sgl_jax.ops.attention.fa.write import WriteRefs, write_chunks, write_scratch

PRODUCT_QUERIES = 256  # queries of a product, over all its heads, as far as heads divide
TURN = 6  # products of a turn at most


def products_of(num_heads: int, num_kv_heads: int, queries: int) -> tuple[int, int]:
    """Heads of a product for a tile of so many queries, all of one KV head, and products of a turn."""
    group = num_heads // num_kv_heads
    joined = part_of(group, max(1, PRODUCT_QUERIES // queries))
    of_group, of_all = (part_of(number // joined, TURN) for number in (group, num_heads))
    return joined, of_all if of_group < of_all <= TURN else of_group


@dataclasses.dataclass(frozen=True)
class Refs:
    """The refs of the kernel. B queries of a tile; a product takes those of J heads, U = N / J products in all. V is H, or
    less where the pool has one plane, whose first V columns are the values; q and o may have heads before tokens
    (tile.of_head), and so have their tiles."""

    num_short: Ref  # SMEM i32[1]: rows that are left to the decode kernel
    first_page: Ref  # SMEM i32[1]: of the layer
    window: Ref  # SMEM i32[1]
    kv_scales: Ref | None  # SMEM f32[2]
    kv_lens: Ref  # SMEM i32[S]
    cu_q_lens: Ref  # SMEM i32[S + 1]
    token_page: Ref  # SMEM i32[T]
    q: Ref  # HBM [T, N * H]
    k: Ref  # HBM [T, K * H]
    v: Ref | None  # HBM [T, K * H]
    sinks: Ref | None  # VMEM f32[N + 8, 128]
    q_norm: Ref | None  # VMEM [1, H]: weight of the norm
    k_norm: Ref | None
    rope: Ref | None  # HBM f32[T, H]: cos and sin (api.QKPrepare)
    table: Ref
    o: Ref  # HBM [T, N * V]
    kv: Ref  # HBM
    q_tiles: Ref  # VMEM [2, B, N * H]
    o_tiles: Ref  # VMEM [2, B, N * V]
    q_sem: Ref  # DMA [2]
    o_sem: Ref  # DMA [2]
    top: Ref  # VMEM f32[U, J * B, 128]: the same in all lanes
    total: Ref  # VMEM f32[U, J * B, 128]: lanes are to be summed
    acc: Ref  # VMEM f32[U, J * B, V]
    ring: dict[str, Ref]
    write: dict[str, Ref]
    rope_tiles: Ref = None  # VMEM f32[2, B, H]


def _kernel(
    refs: Refs,
    *,
    num_heads: int,
    groups: int,
    unit_pages: int,
    lines_set: int,
    scores: Scores,
    prepare: Prepare,
    has_window: bool,
):
    num_rows = refs.kv_lens.shape[0]
    last_token = refs.cu_q_lens[num_rows]
    shared = ("num_short", "first_page", "kv_lens", "cu_q_lens", "token_page", "k", "v", "k_norm", "rope", "kv")
    write_chunks(WriteRefs(**{name: getattr(refs, name) for name in shared}, **refs.write), prepare)

    scores = scores.scaled(refs.kv_scales)
    pages = PageRing(**refs.ring, kv=refs.kv, table=refs.table, groups=groups, first_page=refs.first_page[0])
    _, num_kv_heads, _, page_size, head_dim = refs.kv.shape
    value_dim = refs.acc.shape[2]
    group = num_heads // num_kv_heads
    products = refs.acc.shape[0]
    block_tokens = pages.pages * page_size
    tile_tokens = refs.q_tiles.shape[-2]
    joined, in_turn = products_of(num_heads, num_kv_heads, tile_tokens)
    window = refs.window[0]
    first_row = refs.num_short[0]
    first_token = refs.cu_q_lens[first_row]
    first_token = jnp.where(first_token < last_token, first_token, lines_set)
    first_tile = div(first_token, tile_tokens)
    num_tiles = refs.q.shape[-2] // tile_tokens

    def positions(row, tile):
        """The positions [first, end) in its row of a tile's tokens of that row, and what to add to a token for its position."""
        shift = refs.kv_lens[row] - refs.cu_q_lens[row + 1]
        first = jnp.maximum(refs.cu_q_lens[row], tile * tile_tokens)
        end = jnp.minimum(refs.cu_q_lens[row + 1], (tile + 1) * tile_tokens)
        return first + shift, end + shift, shift

    def first_key(first):
        return jnp.maximum(first + 1 - window, 0) if has_window else jnp.int32(0)

    def block_range(row, tile):
        first, end, _ = positions(row, tile)
        return div(first_key(first), block_tokens), cdiv(end, block_tokens)

    def is_row(row):
        return (row < num_rows) & (refs.cu_q_lens[jnp.minimum(row, num_rows)] < last_token)

    def announce(cursor):
        """Announce the item at the cursor and step on. (items announced, row, tile, block, last block + 1)"""
        n, row, tile, block, end = cursor
        live = is_row(row)

        @pl.when(live)
        def _():
            first, last, _ = positions(row, tile)
            offset = block * pages.pages
            low, high = div(first_key(first), page_size), cdiv(last, page_size)
            pages.announce(n, row, block, jnp.maximum(low, offset), jnp.minimum(high, offset + pages.pages))

        n = n + live.astype(jnp.int32)
        more = block + 1 < end
        row_end = refs.cu_q_lens[jnp.minimum(row + 1, num_rows)]
        row_goes_on = more | (row_end > (tile + 1) * tile_tokens)
        tile = jnp.where(more, tile, jnp.where(row_goes_on, tile + 1, div(row_end, tile_tokens)))
        row = jnp.where(row_goes_on, row, row + 1)
        new_block, new_end = block_range(jnp.minimum(row, num_rows - 1), tile)
        return n, row, tile, jnp.where(more, block + 1, new_block), jnp.where(more, end, new_end)

    def start(n, announced):
        @pl.when(n < announced)
        def _():
            pages.start(n)

    row = jnp.minimum(first_row, num_rows - 1)
    cursor = (jnp.int32(0), first_row, first_tile, *block_range(row, first_tile))
    cursor = lax.fori_loop(0, pages.notice, lambda _, c: announce(c), cursor)
    lax.fori_loop(0, pages.lead, lambda n, _: start(n, cursor[0]), None)

    def tile_copy(hbm, tiles, sem, tile):
        lines = pl.ds(pl.multiple_of(tile * tile_tokens, tile_tokens), tile_tokens)
        at = hbm.at[:, lines] if len(hbm.shape) == 3 else hbm.at[lines]
        slot = rem(tile, 2)
        return at, tiles.at[slot], sem.at[slot]

    def load(hbm, tiles, sem, tile):
        source, target, sem = tile_copy(hbm, tiles, sem, tile)
        return pltpu.make_async_copy(source, target, sem)

    def store(tile):
        target, source, sem = tile_copy(refs.o, refs.o_tiles, refs.o_sem, tile)
        return pltpu.make_async_copy(source, target, sem)

    def tile_loads(tile):
        yield load(refs.q, refs.q_tiles, refs.q_sem, tile)
        if refs.rope is not None:
            yield load(refs.rope, refs.rope_tiles, refs.q_sem, tile)

    def prepare_tile(slot):
        rope = refs.rope_tiles[slot] if refs.rope is not None else None

        def one_head(head, _):
            at = q_at(slot, head)
            x = prepare(refs.q_tiles[at].astype(jnp.float32), refs.q_norm, rope)
            refs.q_tiles[at] = x.astype(refs.q_tiles.dtype)

        lax.fori_loop(0, num_heads, one_head, None)

    def q_at(slot, head):
        return slot, *of_head(refs.q.shape, slice(None), head, head_dim)

    def o_at(slot, head):
        return slot, *of_head(refs.o.shape, slice(None), head, value_dim)

    def for_heads(do):
        """do(product, head's rows in it, head) for each head."""

        def one(product, _):
            for j in range(joined):
                do(product, slice(j * tile_tokens, (j + 1) * tile_tokens), product * joined + j)

        lax.fori_loop(0, products, one, None)

    def has_tokens(tile):
        return tile * tile_tokens < last_token

    @pl.when(first_token < last_token)
    def _():
        for copy in tile_loads(first_tile):
            copy.start()

    def one_pair(row, tile, n, cursor):
        """A tile's queries of one row over the row's blocks."""
        slot = rem(tile, 2)
        first, end, shift = positions(row, tile)
        low = first_key(first)

        def query(width, heads):
            """The position of each query of so many heads of a product, [heads * B, width]."""
            one_head = tile * tile_tokens + shift + lax.broadcasted_iota(jnp.int32, (tile_tokens, width), 0)
            return jnp.concatenate([one_head] * heads, axis=0)

        factor = scores.factor(query(LANES, joined))

        def fresh(product, rows, head):
            shape = tile_tokens, LANES
            if refs.sinks is None:
                refs.top[product, rows] = jnp.full(shape, FLOOR)
                refs.total[product, rows] = jnp.zeros(shape, jnp.float32)
            else:
                sink = jnp.broadcast_to(refs.sinks[pl.ds(head, 1)], shape)
                refs.top[product, rows] = sink / scores.factor(query(LANES, 1))
                refs.total[product, rows] = jnp.full(shape, 1 / LANES, jnp.float32)
            refs.acc[product, rows] = jnp.zeros((tile_tokens, value_dim), jnp.float32)

        for_heads(fresh)

        def over(page_slot, first_page, count, keep):
            def one_turn(turn, _):
                mine = [turn * in_turn + i for i in range(in_turn)]

                def load(product, which):
                    h = div(product * joined, group)
                    return join_pages(pages.buffer, page_slot, first_page, count, h, which, value_dim)

                def queries(product):
                    heads = [product * joined + j for j in range(joined)]
                    return jnp.concatenate([refs.q_tiles[q_at(slot, n)] for n in heads], axis=0)

                states = [(refs.top[i], refs.total[i], refs.acc[i]) for i in mine]
                keys = [[functools.partial(load, i)] for i in mine]
                states = attend(states, [queries(i) for i in mine], keys, keep, scores, factor)
                for i, (top, total, acc) in zip(mine, states, strict=True):
                    refs.top[i] = top
                    refs.total[i] = total
                    refs.acc[i] = acc

            lax.fori_loop(0, products // in_turn, one_turn, None)

        def edge(page_slot, base):
            unit = unit_pages * page_size

            def step(u, _):
                def keep(shape, axis):
                    key = base + u * unit + lax.broadcasted_iota(jnp.int32, shape, axis)
                    if axis == 0:  # of V: what has been copied
                        return (key >= low) & (key < end)
                    position = query(shape[1], joined)
                    return (key <= position) & (key > position - window) if has_window else key <= position

                over(page_slot, u * unit_pages, unit_pages, keep)

            begin = div(jnp.maximum(low - base, 0), unit)
            lax.fori_loop(begin, cdiv(jnp.minimum(end - base, block_tokens), unit), step, None)

        def one_block(block, carry):
            n, cursor = carry
            start(n + pages.lead, cursor[0])
            page_slot = pages.wait(n)
            cursor = announce(cursor)
            base = block * block_tokens
            is_whole = base + block_tokens <= first + 1
            if has_window:
                is_whole &= base > end - 1 - window
            lax.cond(is_whole, lambda: over(page_slot, 0, pages.pages, None), lambda: edge(page_slot, base))
            return n + 1, cursor

        n, cursor = lax.fori_loop(*block_range(row, tile), one_block, (n, cursor))

        def put(product, rows, head):
            token = tile * tile_tokens + lax.broadcasted_iota(jnp.int32, (tile_tokens, value_dim), 0)
            mine = (token >= first - shift) & (token < end - shift)
            out = refs.acc[product, rows] / jnp.sum(refs.total[product, rows], axis=1, keepdims=True) * scores.v_scale
            at = o_at(slot, head)
            refs.o_tiles[at] = jnp.where(mine, out, refs.o_tiles[at].astype(jnp.float32)).astype(refs.o_tiles.dtype)

        for_heads(put)
        return n, cursor

    def one_tile(tile, carry):
        n, cursor, row = carry

        @pl.when(tile - first_tile >= 2)
        def _():
            store(tile - 2).wait()

        @pl.when((tile == first_tile) & (first_token > tile * tile_tokens))
        def _():  # outputs of short rows share this tile
            copy = load(refs.o, refs.o_tiles, refs.o_sem, tile)
            copy.start()
            copy.wait()

        @pl.when(has_tokens(tile) & (first_token < last_token))
        def _():
            for copy in tile_loads(tile):
                copy.wait()

            @pl.when(has_tokens(tile + 1))
            def _():
                for copy in tile_loads(tile + 1):
                    copy.start()

            if refs.q_norm is not None or refs.rope is not None:
                prepare_tile(rem(tile, 2))

        tile_end = jnp.minimum((tile + 1) * tile_tokens, last_token)

        def pair(carry):
            n, cursor, row, _ = carry
            n, cursor = one_pair(row, tile, n, cursor)
            row_end = refs.cu_q_lens[row + 1]
            return (
                n,
                cursor,
                jnp.where(row_end <= (tile + 1) * tile_tokens, row + 1, row),
                jnp.minimum(row_end, tile_end),
            )

        token = jnp.maximum(tile * tile_tokens, first_token)
        n, cursor, row, _ = lax.while_loop(lambda c: c[3] < tile_end, pair, (n, cursor, row, token))

        @pl.when((tile + 1) * tile_tokens > last_token)
        def _():
            def clear(_product, _rows, head):
                token = tile * tile_tokens + lax.broadcasted_iota(jnp.int32, (tile_tokens, value_dim), 0)
                at = o_at(rem(tile, 2), head)
                out = jnp.where(token < last_token, refs.o_tiles[at].astype(jnp.float32), 0)
                refs.o_tiles[at] = out.astype(refs.o_tiles.dtype)

            for_heads(clear)

        store(tile).start()
        return n, cursor, row

    lax.fori_loop(first_tile, num_tiles, one_tile, (jnp.int32(0), cursor, first_row))
    for back in (2, 1):

        @pl.when(num_tiles - first_tile >= back)
        def _(back=back):
            store(num_tiles - back).wait()


def attend_chunks(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    o: jax.Array,
    kv: jax.Array,
    scalars: Scalars,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    token_page: jax.Array,
    table: jax.Array,
    sinks: jax.Array | None,
    prepare: Operands,
    *,
    num_heads: int,
    lines_set: int,
    scores: Scores,
    has_window: bool,
    blocks: ChunkBlocks,
) -> tuple[jax.Array, jax.Array]:
    """q [T, N * H] or [N, T, H], k and v [T, K * H] (v None for a pool of one plane); or, without k and v, q with all
    three (tile.views). o [T, N * V] or [N, T, V], token_page i32[T] without the layer's first page, table
    i32[S * groups * IDS], sinks f32[N + 8, 128]; T a multiple of blocks.queries. If all rows are short, the
    first lines_set lines of o are as they should be.

    Returns o with the lines after the short rows' set, and the pool. Both are changed in place when donated.
    """
    _, num_kv_heads, planes, _, head_dim = kv.shape
    value_dim = o.shape[-1] if o.ndim == 3 else o.shape[-1] // num_heads
    joined, _ = products_of(num_heads, num_kv_heads, blocks.queries)
    state = (num_heads // joined, joined * blocks.queries)
    q_lines = (blocks.queries, num_heads * head_dim) if q.ndim == 2 else (num_heads, blocks.queries, head_dim)
    scratch: dict[str, Any] = {
        "q_tiles": pltpu.VMEM((2, *q_lines), q.dtype),
        "o_tiles": pltpu.VMEM((2, *o.shape[:-2], blocks.queries, o.shape[-1]), o.dtype),
        "q_sem": pltpu.SemaphoreType.DMA((2,)),
        "o_sem": pltpu.SemaphoreType.DMA((2,)),
        "top": pltpu.VMEM((*state, LANES), jnp.float32),
        "total": pltpu.VMEM((*state, LANES), jnp.float32),
        "acc": pltpu.VMEM((*state, value_dim), jnp.float32),
        "ring": ring.scratch(blocks.slots, blocks.pages, kv),
        "write": write_scratch(kv, q, prepare.rope, blocks.write_slots, blocks.write_pages),
    }
    if prepare.rope is not None:
        scratch["rope_tiles"] = pltpu.VMEM((2, blocks.queries, head_dim), jnp.float32)
    optional = {"k": k, "v": v, "sinks": sinks, "q_norm": prepare.q_norm, "k_norm": prepare.k_norm}
    optional["rope"] = prepare.rope
    prefetch = scalars.given() | {"kv_lens": kv_lens, "cu_q_lens": cu_q_lens, "token_page": token_page}
    missing = [name for name, x in (optional | scalars._asdict()).items() if x is None]
    optional = {name: x for name, x in optional.items() if x is not None}
    names = [*prefetch, "q", *optional, "table"]

    def body(*args):
        *plain, _o_in, _kv_in, o, kv_out, rest = args
        fields: dict[str, Any] = dict(zip(names, plain, strict=True)) | dict.fromkeys(missing)
        if k is None:
            fields |= views(fields["q"], num_heads, num_kv_heads)
        groups = table.shape[0] // (kv_lens.shape[0] * ring.IDS)
        _kernel(
            Refs(**fields, o=o, kv=kv_out, **rest),
            num_heads=num_heads,
            groups=groups,
            unit_pages=blocks.unit_pages,
            lines_set=lines_set,
            scores=scores,
            prepare=prepare.spec,
            has_window=has_window,
        )

    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    inputs = [q, *optional.values(), table, o, kv]
    last = len(prefetch) + len(inputs)
    keys = q.shape[-2] * blocks.expected_keys
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype), jax.ShapeDtypeStruct(kv.shape, kv.dtype)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(),
            in_specs=[hbm, *(hbm if name in ("k", "v", "rope") else whole for name in optional), hbm, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[scratch],
        ),
        input_output_aliases={last - 2: 0, last - 1: 1},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, disable_semaphore_checks=True, vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * keys * num_heads * (head_dim + value_dim),
            transcendentals=keys * num_heads,
            bytes_accessed=planes * keys // blocks.queries * num_kv_heads * head_dim * kv.dtype.itemsize
            + (q.size + o.size) * q.dtype.itemsize,
        ),
        name="fa_chunks",
    )(*prefetch.values(), *inputs)
