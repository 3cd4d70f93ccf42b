"""Rows of more tokens than short ones: their K and V go to the pool first, then tiles of queries walk their rows' pages.

Tiles lie at fixed indices of the packed tokens, so that q and o need no other layout than the matmuls around have; a tile
where rows meet is computed once for each of them. The kernel owns every token after those of the short rows: their
outputs, and zeros for padding. Without such rows it only writes the zeros that the decode kernel has not written.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa import ring
from sgl_jax.ops.attention.fa.blocks import EXPECTED_KEYS, ChunkBlocks
from sgl_jax.ops.attention.fa.kernel_call import Refs, Rows, Static, Tokens, run_kernel
from sgl_jax.ops.attention.fa.ring import Cursor, PageRing, Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import FLOOR, LANES, Keep, attend, join_pages, of_head, part_of
from sgl_jax.ops.attention.fa.write import Writer, write_scratch

PRODUCT_QUERIES = 256  # queries of a product, over all its heads, as far as heads divide
TURN = 6  # products of a turn at most


def products_of(num_heads: int, num_kv_heads: int, queries: int) -> tuple[int, int]:
    """Return the heads of a product for a tile of so many queries, all of one KV head, and the products of a turn."""
    group = num_heads // num_kv_heads
    heads = part_of(group, max(1, PRODUCT_QUERIES // queries))
    of_group, of_all = (part_of(number // heads, TURN) for number in (group, num_heads))
    return heads, of_all if of_group < of_all <= TURN else of_group


@dataclasses.dataclass(frozen=True)
class ChunkRefs(Refs):
    """The refs of the kernel. B queries of a tile; a product takes those of J heads, U = N / J products in all."""

    q_tiles: Ref  # VMEM [2, B, N * H], or heads first, as q
    o_tiles: Ref  # VMEM [2, B, N * V]
    q_sem: Ref  # DMA [2]
    o_sem: Ref  # DMA [2]
    top: Ref  # VMEM f32[U, J * B, 128]: the same in all lanes
    total: Ref  # VMEM f32[U, J * B, 128]: lanes are to be summed
    acc: Ref  # VMEM f32[U, J * B, V]
    write: dict[str, Ref]
    rope_tiles: Ref = None  # VMEM f32[2, B, H]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The kernel's refs and numbers, the order of its work, and the copies of tiles."""

    refs: ChunkRefs
    static: Static
    pages: PageRing
    unit_pages: int  # pages attended to at a time in a block that has keys some query does not see
    last_token: jax.Array  # the first of the padding
    window: jax.Array | None
    first_token: jax.Array  # first token of the rows after the short ones
    first_tile: jax.Array
    tokens: int  # tokens of a tile, B
    product_heads: int  # J

    def positions(self, row, tile):
        """Return the positions [first, end) in its row of a tile's tokens of that row, and what to add to the index of a
        packed token for its position."""
        shift = self.refs.kv_lens[row] - self.refs.cu_q_lens[row + 1]
        first = jnp.maximum(self.refs.cu_q_lens[row], tile * self.tokens)
        end = jnp.minimum(self.refs.cu_q_lens[row + 1], (tile + 1) * self.tokens)
        return first + shift, end + shift, shift

    def first_key(self, position):
        """Return the first key that a query at the position sees, or its own if it sees none."""
        least = self.static.first_key
        low = jnp.int32(0) if self.window is None else jnp.maximum(position + 1 - self.window, 0)
        return low if least == 0 else jnp.maximum(low, jnp.minimum(position, least))

    def block_range(self, row, tile):
        """Return the blocks [first, end) of keys that a tile's queries of the row see."""
        first, end, _ = self.positions(row, tile)
        return div(self.first_key(first), self.pages.block_tokens), cdiv(end, self.pages.block_tokens)

    def announce(self, cursor: Cursor) -> Cursor:
        """Announce the item at the cursor and step on. (items announced, row, tile, block, last block + 1)"""
        n, row, tile, block, end = cursor
        cu_q_lens, num_rows, pages = self.refs.cu_q_lens, self.refs.kv_lens.shape[0], self.pages
        live = (row < num_rows) & (cu_q_lens[jnp.minimum(row, num_rows)] < self.last_token)

        @pl.when(live)
        def _():
            first, last, _ = self.positions(row, tile)
            offset = block * pages.pages
            low, high = div(self.first_key(first), self.static.page_size), cdiv(last, self.static.page_size)
            pages.announce(n, row, block, jnp.maximum(low, offset), jnp.minimum(high, offset + pages.pages))

        n = n + live.astype(jnp.int32)
        more = block + 1 < end
        row_end = cu_q_lens[jnp.minimum(row + 1, num_rows)]
        row_goes_on = more | (row_end > (tile + 1) * self.tokens)
        tile = jnp.where(more, tile, jnp.where(row_goes_on, tile + 1, div(row_end, self.tokens)))
        row = jnp.where(row_goes_on, row, row + 1)
        new_block, new_end = self.block_range(jnp.minimum(row, num_rows - 1), tile)
        return n, row, tile, jnp.where(more, block + 1, new_block), jnp.where(more, end, new_end)

    def for_heads(self, do: Callable[[Any, slice, Any], None]) -> None:
        """Call do(product, the head's rows in it, head) for each head."""

        def one(product, _):
            for j in range(self.product_heads):
                do(product, slice(j * self.tokens, (j + 1) * self.tokens), product * self.product_heads + j)

        lax.fori_loop(0, self.refs.acc.shape[0], one, None)

    def q_at(self, slot, head):
        """Return the index of a head's queries [B, H] in refs.q_tiles."""
        return slot, *of_head(self.refs.q.shape, slice(None), head, self.static.head_dim)

    def o_at(self, slot, head):
        """Return the index of a head's outputs [B, V] in refs.o_tiles."""
        return slot, *of_head(self.refs.o.shape, slice(None), head, self.static.value_dim)

    def loads(self, tile) -> Iterator[Any]:
        """Make the copies of a tile's q and of its cos and sin."""
        yield self._copy(self.refs.q, self.refs.q_tiles, self.refs.q_sem, tile)
        if self.refs.rope is not None:
            yield self._copy(self.refs.rope, self.refs.rope_tiles, self.refs.q_sem, tile)

    def o_copy(self, tile, to_hbm: bool) -> Any:
        """Make the copy of a tile of o."""
        return self._copy(self.refs.o, self.refs.o_tiles, self.refs.o_sem, tile, to_hbm)

    def _copy(self, hbm: Ref, tiles: Ref, sem: Ref, tile, to_hbm: bool = False) -> Any:
        lines = pl.ds(pl.multiple_of(tile * self.tokens, self.tokens), self.tokens)
        at = hbm.at[:, lines] if len(hbm.shape) == 3 else hbm.at[lines]
        slot = rem(tile, 2)
        ends = (tiles.at[slot], at) if to_hbm else (at, tiles.at[slot])
        return pltpu.make_async_copy(*ends, sem.at[slot])

    def prepare_tile(self, slot) -> None:
        """Norm and rotate a tile's queries."""
        rope = self.refs.rope_tiles[slot] if self.refs.rope is not None else None

        def one_head(head, _):
            at = self.q_at(slot, head)
            x = self.static.prepare(self.refs.q_tiles[at].astype(jnp.float32), self.refs.q_norm, rope)
            self.refs.q_tiles[at] = x.astype(self.refs.q_tiles.dtype)

        lax.fori_loop(0, self.static.num_heads, one_head, None)

    def clear(self, tile) -> None:
        """Set the outputs of a tile's padding to zero."""

        def clear_head(_product, _rows, head):
            token = tile * self.tokens + lax.broadcasted_iota(jnp.int32, (self.tokens, self.static.value_dim), 0)
            at = self.o_at(rem(tile, 2), head)
            out = jnp.where(token < self.last_token, self.refs.o_tiles[at].astype(jnp.float32), 0)
            self.refs.o_tiles[at] = out.astype(self.refs.o_tiles.dtype)

        self.for_heads(clear_head)

    def one_tile(self, tile, carry):
        """Compute a tile of o: fetch its queries, attend row by row, clear its padding, send it to HBM."""
        n, cursor, row = carry
        self._fetch(tile)
        cu_q_lens, tokens, last_token = self.refs.cu_q_lens, self.tokens, self.last_token
        tile_end = jnp.minimum((tile + 1) * tokens, last_token)

        def one_row(carry):
            n, cursor, row, _ = carry
            n, cursor = self._attend_row(row, tile, n, cursor)
            row_end = cu_q_lens[row + 1]
            next_row = jnp.where(row_end <= (tile + 1) * tokens, row + 1, row)
            return n, cursor, next_row, jnp.minimum(row_end, tile_end)

        token = jnp.maximum(tile * tokens, self.first_token)
        n, cursor, row, _ = lax.while_loop(lambda c: c[3] < tile_end, one_row, (n, cursor, row, token))

        @pl.when((tile + 1) * tokens > last_token)
        def _():
            self.clear(tile)

        self.o_copy(tile, to_hbm=True).start()
        return n, cursor, row

    def _fetch(self, tile) -> None:
        """Free the tile's slot, wait for its queries, start the copies of the next tile's, then norm and rotate."""
        tokens, last_token = self.tokens, self.last_token

        @pl.when(tile - self.first_tile >= 2)
        def _():
            self.o_copy(tile - 2, to_hbm=True).wait()

        @pl.when((tile == self.first_tile) & (self.first_token > tile * tokens))
        def _():  # the decode kernel has put outputs into a part of it
            copy = self.o_copy(tile, to_hbm=False)
            copy.start()
            copy.wait()

        @pl.when((tile * tokens < last_token) & (self.first_token < last_token))
        def _():
            for copy in self.loads(tile):
                copy.wait()

            @pl.when((tile + 1) * tokens < last_token)
            def _():
                for copy in self.loads(tile + 1):
                    copy.start()

            if self.refs.q_norm is not None or self.refs.rope is not None:
                self.prepare_tile(rem(tile, 2))

    def _attend_row(self, row, tile, n, cursor: Cursor):
        """Attend with a tile's queries of one row to the row's blocks, items n and later."""
        slot = rem(tile, 2)
        first, end, shift = self.positions(row, tile)
        low = self.first_key(first)
        queries = Queries(self, tile, slot, first, end, shift, low)
        factor = self.static.scores.factor(queries.positions(LANES, self.product_heads))
        queries.start()

        def one_block(block, carry):
            n, cursor = carry
            page_slot, cursor = self.pages.advance(n, cursor, self.announce)
            queries.attend_block(block, page_slot, factor)
            return n + 1, cursor

        n, cursor = lax.fori_loop(*self.block_range(row, tile), one_block, (n, cursor))
        queries.write_out()
        return n, cursor


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of one row in one tile, and their online softmax over the row's blocks of keys."""

    chunks: Chunks
    tile: jax.Array
    slot: jax.Array  # slot of the tile
    first: jax.Array  # their positions in the row: [first, end)
    end: jax.Array
    shift: jax.Array  # from the index of a packed token to its position
    low: jax.Array  # the first key that any of them sees

    def positions(self, width: int, heads: int) -> jax.Array:
        """Return the position of each query of so many heads of a product, [heads * B, width]."""
        tokens = self.chunks.tokens
        one_head = self.tile * tokens + self.shift + lax.broadcasted_iota(jnp.int32, (tokens, width), 0)
        return jnp.concatenate([one_head] * heads, axis=0)

    def start(self) -> None:
        """Set the softmax to that over no keys, sinks aside."""
        refs, shape = self.chunks.refs, (self.chunks.tokens, LANES)

        def start_head(product, rows, head):
            if refs.sinks is None:
                refs.top[product, rows] = jnp.full(shape, FLOOR)
                refs.total[product, rows] = jnp.zeros(shape, jnp.float32)
            else:
                sink = jnp.broadcast_to(refs.sinks[pl.ds(head, 1)], shape)
                refs.top[product, rows] = sink / self.chunks.static.scores.factor(self.positions(LANES, 1))
                refs.total[product, rows] = jnp.full(shape, 1 / LANES, jnp.float32)
            refs.acc[product, rows] = jnp.zeros((self.chunks.tokens, self.chunks.static.value_dim), jnp.float32)

        self.chunks.for_heads(start_head)

    def attend_block(self, block, page_slot, factor) -> None:
        """Attend to a block of keys in a slot of the ring."""
        chunks = self.chunks
        base = block * chunks.pages.block_tokens
        is_whole = base + chunks.pages.block_tokens <= self.first + 1
        if chunks.window is not None:
            is_whole &= base > self.end - 1 - chunks.window
        if chunks.static.first_key:
            is_whole &= base >= chunks.static.first_key
        lax.cond(
            is_whole,
            lambda: self._attend_pages(page_slot, 0, chunks.pages.pages, None, factor),
            lambda: self._attend_edge(page_slot, base, factor),
        )

    def _attend_edge(self, page_slot, base, factor) -> None:
        """Attend to a block whose first key is `base`, unit by unit: some keys are not seen by all queries, or are stale."""
        unit, window = self.chunks.unit_pages * self.chunks.static.page_size, self.chunks.window
        least = self.chunks.static.first_key

        def step(u, _):
            def keep(shape, axis):
                key = base + u * unit + lax.broadcasted_iota(jnp.int32, shape, axis)
                if axis == 0:  # keys of V that have been copied
                    return (key >= self.low) & (key < self.end)
                position = self.positions(shape[1], self.chunks.product_heads)
                seen = key <= position if window is None else (key <= position) & (key > position - window)
                return seen if least == 0 else seen & (key >= least)

            self._attend_pages(page_slot, u * self.chunks.unit_pages, self.chunks.unit_pages, keep, factor)

        begin = div(jnp.maximum(self.low - base, 0), unit)
        lax.fori_loop(begin, cdiv(jnp.minimum(self.end - base, self.chunks.pages.block_tokens), unit), step, None)

    def _attend_pages(self, page_slot, first_page, count: int, keep: Keep | None, factor) -> None:
        """Take pages [first_page, first_page + count) of a slot into the softmax, some products at a time."""
        chunks, static, refs = self.chunks, self.chunks.static, self.chunks.refs
        _, in_turn = products_of(static.num_heads, static.num_kv_heads, chunks.tokens)

        def one_turn(turn, _):
            mine = [turn * in_turn + i for i in range(in_turn)]

            def load(product, which):
                h = div(product * chunks.product_heads, static.group)
                return join_pages(chunks.pages.buffer, page_slot, first_page, count, h, which, static.value_dim)

            def queries(product):
                heads = [product * chunks.product_heads + j for j in range(chunks.product_heads)]
                return jnp.concatenate([refs.q_tiles[chunks.q_at(self.slot, n)] for n in heads], axis=0)

            states = [(refs.top[i], refs.total[i], refs.acc[i]) for i in mine]
            keys = [[functools.partial(load, i)] for i in mine]
            states = attend(states, [queries(i) for i in mine], keys, keep, self.chunks.static.scores, factor)
            for i, (top, total, acc) in zip(mine, states, strict=True):
                refs.top[i] = top
                refs.total[i] = total
                refs.acc[i] = acc

        lax.fori_loop(0, refs.acc.shape[0] // in_turn, one_turn, None)

    def write_out(self) -> None:
        """Put the outputs into the tile, and leave those of the tile's other rows as they are."""
        chunks, refs = self.chunks, self.chunks.refs

        def write_head(product, rows, head):
            shape = chunks.tokens, chunks.static.value_dim
            token = self.tile * chunks.tokens + lax.broadcasted_iota(jnp.int32, shape, 0)
            mine = (token >= self.first - self.shift) & (token < self.end - self.shift)
            acc, total = refs.acc[product, rows], refs.total[product, rows]
            out = acc / jnp.sum(total, axis=1, keepdims=True) * self.chunks.static.scores.v_scale
            at = chunks.o_at(self.slot, head)
            refs.o_tiles[at] = jnp.where(mine, out, refs.o_tiles[at].astype(jnp.float32)).astype(refs.o_tiles.dtype)

        chunks.for_heads(write_head)


def _kernel(refs: ChunkRefs, static: Static, unit_pages: int, lines_set: int) -> None:
    """Write the new K and V, then compute o tile by tile, from the tile of the first token of a longer row."""
    num_rows = refs.kv_lens.shape[0]
    last_token = refs.cu_q_lens[num_rows]
    Writer(refs, static, refs.cu_q_lens[num_rows], **refs.write).write_all()

    static = dataclasses.replace(static, scores=static.scores.scaled(refs.kv_scales))
    pages = refs.pages()
    window = refs.window[0] if static.has_window else None
    first_row = refs.num_short[0]
    first_token = refs.cu_q_lens[first_row]
    first_token = jnp.where(first_token < last_token, first_token, lines_set)
    tile_tokens, heads = refs.q_tiles.shape[-2], static.num_heads // refs.acc.shape[0]
    first_tile = div(first_token, tile_tokens)
    num_tiles = refs.q.shape[-2] // tile_tokens
    chunks = Chunks(refs, static, pages, unit_pages, last_token, window, first_token, first_tile, tile_tokens, heads)

    row = jnp.minimum(first_row, num_rows - 1)
    cursor = (jnp.int32(0), first_row, first_tile, *chunks.block_range(row, first_tile))
    cursor = pages.begin(cursor, chunks.announce)

    @pl.when(first_token < last_token)
    def _():
        for copy in chunks.loads(first_tile):
            copy.start()

    lax.fori_loop(first_tile, num_tiles, chunks.one_tile, (jnp.int32(0), cursor, first_row))
    for back in (2, 1):

        @pl.when(num_tiles - first_tile >= back)
        def _(back=back):
            chunks.o_copy(num_tiles - back, to_hbm=True).wait()


def attend_chunks(
    tokens: Tokens,
    rows: Rows,
    o: jax.Array | jax.ShapeDtypeStruct,
    kv: jax.Array,
    static: Static,
    blocks: ChunkBlocks,
    *,
    lines_set: int,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the rows after the short ones.

    o [T, N * V] or [N, T, V], or its shape if there are no short rows; T a multiple of blocks.queries. If all rows are short, the
    first lines_set lines of o are as they should be. Returns o with the lines after the short rows' set, and the pool; both
    are changed in place when donated.
    """
    num_heads, head_dim, q, rope = static.num_heads, static.head_dim, tokens.q, tokens.rope
    heads, _ = products_of(num_heads, static.num_kv_heads, blocks.queries)
    state = num_heads // heads, heads * blocks.queries
    q_tile = (blocks.queries, num_heads * head_dim) if q.ndim == 2 else (num_heads, blocks.queries, head_dim)
    scratch: dict[str, Any] = {
        "q_tiles": pltpu.VMEM((2, *q_tile), q.dtype),
        "o_tiles": pltpu.VMEM((2, *o.shape[:-2], blocks.queries, o.shape[-1]), o.dtype),
        "q_sem": pltpu.SemaphoreType.DMA((2,)),
        "o_sem": pltpu.SemaphoreType.DMA((2,)),
        "top": pltpu.VMEM((*state, LANES), jnp.float32),
        "total": pltpu.VMEM((*state, LANES), jnp.float32),
        "acc": pltpu.VMEM((*state, static.value_dim), jnp.float32),
        "ring": ring.scratch(blocks.slots, blocks.pages, kv),
        "write": write_scratch(kv, q, rope, blocks.write_slots, blocks.write_pages),
    }
    if rope is not None:
        scratch["rope_tiles"] = pltpu.VMEM((2, blocks.queries, head_dim), jnp.float32)
    keys = q.shape[-2] * EXPECTED_KEYS
    return run_kernel(
        "fa_chunks",
        lambda refs: _kernel(ChunkRefs(**refs), static, blocks.unit_pages, lines_set),
        tokens,
        rows,
        kv,
        o,
        scratch,
        static=static,
        lines=None,
        vmem_limit=blocks.vmem_limit,
        pairs=keys,
        keys=keys // blocks.queries,
    )
