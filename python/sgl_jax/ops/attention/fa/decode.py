"""Short rows, of at most W new tokens: one program over all of them, row after row, block of pages after block.

q, o and the new K and V of all rows lie in VMEM. All queries of a row go through its keys together, so these are read once.
Before a block with new tokens is attended to, their K and V are put into it in VMEM, and the row tiles of the pool that
hold them go back to HBM.
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
from sgl_jax.ops.attention.fa.blocks import EXPECTED_KEYS, DecodeBlocks
from sgl_jax.ops.attention.fa.kernel_call import Refs, Rows, Static, Tokens, run_kernel
from sgl_jax.ops.attention.fa.ring import Cursor, PageRing, Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import FLOOR, LANES, Keep, State, attend, join_pages, of_head, part_of, row_tile

WRITES = 4  # row tiles on their way back to the pool at a time
UNROLLED_HEADS = 32  # loops over heads are unrolled up to so many of them
PART_HEADS = 128  # query heads of a product at most
CUTS = 2  # with one product per block, its keys are cut so that one half's product overlaps the other's softmax


@dataclasses.dataclass(frozen=True)
class DecodeRefs(Refs):
    """The refs of the kernel. R tokens, a multiple of 16; C = H / 128 lane tiles. A part is the heads of a product."""

    heads: Ref  # VMEM f32[C, R * N + pad, 128]: q by (part, token, head of the part); o takes its place row by row
    new: Ref  # VMEM f32[C, R * K * planes + pad, 128]: K and V by (token, KV head, which)
    tiles: Ref  # VMEM [WRITES, K, planes, row tile, H]
    write_sem: Ref  # DMA [WRITES]


@dataclasses.dataclass(frozen=True)
class Decode:
    """The kernel's refs and numbers, and the order of its work."""

    refs: DecodeRefs
    static: Static
    pages: PageRing
    unit_pages: int  # pages attended to at a time in a block that has keys some query does not see
    num_rows: jax.Array
    window: jax.Array | None
    num_tokens: jax.Array
    part: int  # heads of a product
    part_rows: int  # lines of a product, in whole tiles
    first_heads: range  # the first head of each part

    def new_tokens(self, row):
        """Return the first new token of a row, and how many it has."""
        if self.static.width == 1:
            return row, 1
        first = self.refs.cu_q_lens[row]
        return first, self.refs.cu_q_lens[row + 1] - first

    def first_key(self, row):
        """Return the first key that the row's first query sees, or its own if it sees none."""
        earlier, least = self.new_tokens(row)[1] - 1, self.static.first_key
        low = jnp.int32(0) if self.window is None else jnp.maximum(self.refs.kv_lens[row] - earlier - self.window, 0)
        return low if least == 0 else jnp.maximum(low, jnp.minimum(self.refs.kv_lens[row] - earlier - 1, least))

    def block_range(self, row):
        """Return the blocks [first, end) of keys that the row's queries see."""
        return div(self.first_key(row), self.pages.block_tokens), cdiv(self.refs.kv_lens[row], self.pages.block_tokens)

    def announce(self, cursor: Cursor) -> Cursor:
        """Announce the item at the cursor and step on. (items announced, row, block, the row's last block + 1)"""
        n, row, block, end = cursor
        kv_lens, pages = self.refs.kv_lens, self.pages

        @pl.when(row < self.num_rows)
        def _():
            first = div(self.first_key(row), self.static.page_size)
            last = cdiv(kv_lens[row], self.static.page_size)
            offset = block * pages.pages
            pages.announce(n, row, block, jnp.maximum(first, offset), jnp.minimum(last, offset + pages.pages))

        n = n + (row < self.num_rows).astype(jnp.int32)
        more = block + 1 < end
        row = jnp.where(more, row, row + 1)
        new_block, new_end = self.block_range(jnp.minimum(row, kv_lens.shape[0] - 1))
        return n, row, jnp.where(more, block + 1, new_block), jnp.where(more, end, new_end)

    def line_of(self, token, head):
        """Return the line of a token's head in refs.heads: (index of the part * R + token) * part + head of the part."""
        part = self.part
        index = head // part if isinstance(head, int) else div(head, part)
        return token * part + (index * (self.refs.o.shape[-2] - 1) * part + head)

    def spread(self, r, _=None) -> None:
        """Put 16 tokens of q, k and v, [R, heads * H], into their lines, q and k normed and rotated."""
        refs, num_kv_heads, planes = self.refs, self.static.num_kv_heads, self.static.planes
        at = pl.ds(pl.multiple_of(r * 16, 16), 16)
        rope = refs.rope[at, :] if refs.rope is not None else None

        def put(target, lines, x):
            for c in self.static.lane_tiles:
                target[c, lines] = x[:, c * LANES : (c + 1) * LANES]

        def load(source, head):
            return source[of_head(source.shape, at, head, self.static.head_dim)].astype(jnp.float32)

        def one_head(n, _):
            x = self.static.prepare(load(refs.q, n), refs.q_norm, rope)
            put(refs.heads, pl.ds(self.line_of(r * 16, n), 16, stride=self.part), x)

        num_heads = self.static.num_heads
        lax.fori_loop(0, num_heads, one_head, None, unroll=num_heads <= UNROLLED_HEADS)
        for h in range(num_kv_heads):
            line, stride = (r * 16 * num_kv_heads + h) * planes, planes * num_kv_heads
            put(refs.new, pl.ds(line, 16, stride=stride), self.static.prepare(load(refs.k, h), refs.k_norm, rope))
            if refs.v is not None:
                put(refs.new, pl.ds(line + 1, 16, stride=stride), load(refs.v, h))

    def gather(self, r, _=None) -> None:
        """Bring 16 tokens of o back to [R, N * V]; zeros after the last row."""
        refs, value_tiles = self.refs, range(self.static.value_dim // LANES)
        at = pl.ds(pl.multiple_of(r * 16, 16), 16)
        live = r * 16 + lax.broadcasted_iota(jnp.int32, (16, LANES), 0) < self.num_tokens

        def one_head(n, _):
            lines = pl.ds(self.line_of(r * 16, n), 16, stride=self.part)
            x = jnp.concatenate([jnp.where(live, refs.heads[c, lines], 0) for c in value_tiles], 1)
            refs.o[of_head(refs.o.shape, at, n, self.static.value_dim)] = x.astype(refs.o.dtype)

        num_heads = self.static.num_heads
        lax.fori_loop(0, num_heads, one_head, None, unroll=num_heads <= UNROLLED_HEADS)

    def one_row(self, row, carry):
        """Attend with a row's queries to its blocks: those with old keys only, then those that get new tokens."""
        n, cursor, *counted = carry
        written = row if self.static.width == 1 else counted[0]  # row tiles sent to the pool; with W = 1, one a row
        mine = Row.of(self, row)
        state = [mine.start(head) for head in self.first_heads]
        first_new = mine.end - 1 if self.static.width == 1 else div(mine.position, self.pages.block_tokens)
        n, cursor, state = lax.fori_loop(mine.begin, first_new, mine.old_block, (n, cursor, state))
        carry = n, cursor, written, state
        if self.static.width == 1:
            n, cursor, written, state = mine.new_block(mine.end - 1, carry)
        else:
            n, cursor, written, state = lax.fori_loop(first_new, mine.end, mine.new_block, carry)
        mine.write_out(state)
        return (n, cursor) if self.static.width == 1 else (n, cursor, written)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's queries, and their online softmax over its blocks of keys. The softmax has a State for each part."""

    decode: Decode
    kv_len: jax.Array
    first: jax.Array  # Decode.first_key
    all_see: jax.Array  # the first key that no query's window leaves out, nor first_key of the spec
    begin: jax.Array  # its blocks are [begin, end)
    end: jax.Array
    token: jax.Array  # index of the first new token in the packed tokens
    number: jax.Array | int  # number of new tokens
    position: jax.Array  # position of the first new token in the row
    lines: list[Any]  # lines of each part in refs.heads
    q: list[jax.Array]  # queries of each part, [part_rows, H]
    factor: float | jax.Array  # Scores.factor of a product's lines

    @staticmethod
    def of(decode: Decode, row) -> Row:
        """Read a row's numbers and queries."""
        refs, part_rows, width = decode.refs, decode.part_rows, decode.static.width
        kv_len, first = refs.kv_lens[row], decode.first_key(row)
        begin, end = decode.block_range(row)
        token, number = decode.new_tokens(row)
        first_new = refs.kv_lens[row] - number
        lines = [pl.ds(decode.line_of(token, head), part_rows) for head in decode.first_heads]
        dtype = decode.static.scores.dtype
        q = [jnp.concatenate([refs.heads[c, at] for c in decode.static.lane_tiles], 1).astype(dtype) for at in lines]
        position = jnp.full((part_rows, LANES), first_new)
        if width > 1:
            position = position + query_of(position.shape, decode.part, width)
        factor = decode.static.scores.factor(position)
        all_see = first if width == 1 or decode.window is None else kv_len - decode.window
        if decode.static.first_key:
            all_see = jnp.maximum(all_see, decode.static.first_key)
        return Row(decode, kv_len, first, all_see, begin, end, token, number, first_new, lines, q, factor)

    def start(self, head: int) -> State:
        """Return the softmax over no keys, sinks aside, of the part that begins with a head."""
        part_rows, width, sinks = self.decode.part_rows, self.decode.static.width, self.decode.refs.sinks
        if sinks is None:
            top, total = jnp.full((part_rows, LANES), FLOOR), jnp.zeros((part_rows, LANES), jnp.float32)
        else:
            top = sinks[head * width : head * width + part_rows] / self.factor
            total = jnp.full((part_rows, LANES), 1 / LANES, jnp.float32)  # lanes are summed at the end
        return top, total, jnp.zeros((part_rows, self.decode.static.value_dim), jnp.float32)

    def old_block(self, block, carry):
        """Attend to a block without new tokens, item n."""
        n, cursor, state = carry
        decode = self.decode
        slot, cursor = decode.pages.advance(n, cursor, decode.announce)
        if decode.static.sees_all:
            state = self._attend_pages(state, slot, 0, decode.pages.pages, None)
        else:
            state = self._attend_block(state, slot, block, block * decode.pages.block_tokens >= self.all_see)
        return n + 1, cursor, state

    def new_block(self, block, carry):
        """Put the new tokens into their block, item n, and attend to it."""
        n, cursor, written, state = carry
        decode = self.decode
        slot, cursor = decode.pages.advance(n, cursor, decode.announce)
        written = self._insert(n, slot, block, written)
        if decode.static.width == 1:
            is_whole = self.kv_len == self.end * decode.pages.block_tokens
        else:
            is_whole = self.position + 1 >= (block + 1) * decode.pages.block_tokens
        if not decode.static.sees_all:
            is_whole &= block * decode.pages.block_tokens >= self.all_see
        state = self._attend_block(state, slot, block, is_whole)
        return n + 1, cursor, written, state

    def _attend_block(self, state: list[State], slot, block, is_whole) -> list[State]:
        """Attend to a block in a slot of the ring: at once if all queries see all of its keys, else by units."""
        return lax.cond(
            is_whole,
            lambda s: self._attend_pages(s, slot, 0, self.decode.pages.pages, None),
            lambda s: self._attend_edge(s, slot, block),
            state,
        )

    def _attend_edge(self, state: list[State], slot, block) -> list[State]:
        """Attend unit by unit to a block of which some keys are not seen by all queries, or are stale."""
        decode, window, width = self.decode, self.decode.window, self.decode.static.width
        least = decode.static.first_key
        unit = decode.unit_pages * decode.static.page_size
        base = block * decode.pages.block_tokens
        low, high = jnp.maximum(self.first - base, 0), jnp.minimum(self.kv_len - base, decode.pages.block_tokens)

        def step(u, state):
            def keep(shape, axis):
                at = u * unit + lax.broadcasted_iota(jnp.int32, shape, axis)
                if width > 1 and axis == 1:
                    last = self.position - base + query_of(shape, decode.part, width)
                    seen = at <= last if window is None else (at <= last) & (at > last - window)
                else:
                    seen = at < high if window is None else (at >= low) & (at < high)
                return seen if least == 0 else seen & (at >= least - base)

            return self._attend_pages(state, slot, u * decode.unit_pages, decode.unit_pages, keep)

        return lax.fori_loop(div(low, unit), cdiv(high, unit), step, state)

    def _attend_pages(self, state: list[State], slot, first_page, count: int, keep: Keep | None) -> list[State]:
        """Take pages [first_page, first_page + count) of a slot into the softmax."""
        decode = self.decode
        is_alone = len(decode.first_heads) == 1 and decode.part_rows > 8
        some = count // (CUTS if is_alone and keep is None and count % CUTS == 0 else 1)

        def load(h, first, which):
            buffer, value_dim = decode.pages.buffer, decode.static.value_dim
            return join_pages(buffer, slot, first_page + first, some, h, which, value_dim)

        firsts, group = range(0, count, some), decode.static.group
        loads = [[functools.partial(load, head // group, first) for first in firsts] for head in decode.first_heads]
        return attend(state, self.q, loads, keep, decode.static.scores, self.factor)

    def _insert(self, n, slot, block, written):
        """Put the row's new K and V into a block, item n, and send their row tiles to the pool. Returns the number of tiles
        sent by all rows so far."""
        decode = self.decode
        if decode.static.width == 1:
            return self._insert_tile(n, slot, block, self.position, written)
        height, block_tokens = decode.refs.tiles.shape[3], decode.pages.block_tokens
        first = jnp.maximum(self.position, block * block_tokens)
        end = jnp.minimum(self.position + self.number, (block + 1) * block_tokens)

        def one_tile(tile, written):
            return self._insert_tile(n, slot, block, tile * height, written)

        return lax.fori_loop(div(first, height), cdiv(end, height), one_tile, written)

    def _insert_tile(self, n, slot, block, position, written):
        """Put the row's new K and V that fall into one row tile (`height` tokens of a page) into the block in VMEM, and start
        the tile's copy to the pool. Return `written` + 1.

        `position` is that of the new token if W = 1, else that of the tile's first token.
        """
        decode, refs, pages, width = self.decode, self.decode.refs, self.decode.pages, self.decode.static.width
        _, num_kv_heads, planes, page_size, head_dim = refs.kv.shape
        height = refs.tiles.shape[3]
        page = div(position, page_size)
        offset = rem(position, page_size)
        top = pl.multiple_of(div(offset, height) * height, height)
        first = offset - top if width == 1 else self.position - position  # first new token, counted in the tile
        w = rem(written, WRITES)

        @pl.when(written >= WRITES)
        def _():
            _written(refs, w).wait()

        line = lax.broadcasted_iota(jnp.int32, (height, head_dim), 0)
        heres = [line == first, *(line == jnp.where(i < self.number, first + i, -1) for i in range(1, width))]
        for h in range(num_kv_heads):
            for which in range(planes):
                at = slot, page - block * pages.pages, h, which, pl.ds(top, height)
                tile = pages.buffer[at].astype(jnp.float32)
                for i, here in enumerate(heres):
                    source = pl.ds(((self.token + i) * num_kv_heads + h) * planes + which, 1)
                    x = jnp.concatenate([refs.new[c, source] for c in decode.static.lane_tiles], 1)
                    tile = jnp.where(here, x, tile)
                tile = tile.astype(pages.buffer.dtype)
                pages.buffer[at] = tile
                refs.tiles[w, h, which] = tile
        target = refs.kv.at[pages.page_id(n, page), :, :, pl.ds(top, height)]
        pltpu.make_async_copy(refs.tiles.at[w], target, refs.write_sem.at[w]).start()
        return written + 1

    def write_out(self, state: list[State]) -> None:
        """Put the outputs into refs.heads, in place of the row's queries."""
        decode, heads, part = self.decode, self.decode.refs.heads, self.decode.part
        for (_, total, acc), at in zip(state, self.lines, strict=True):
            out = acc / jnp.sum(total, axis=1, keepdims=True) * decode.static.scores.v_scale
            for c in range(decode.static.value_dim // LANES):
                x = out[:, c * LANES : (c + 1) * LANES]
                if decode.static.width == 1:
                    heads[c, pl.ds(at.start, part)] = x[:part]
                else:  # later lines are queries of rows to come
                    mine = lax.broadcasted_iota(jnp.int32, x.shape, 0) < self.number * part
                    heads[c, at] = jnp.where(mine, x, heads[c, at])


def query_of(shape: tuple[int, ...], part: int, width: int) -> jax.Array:
    """Return, as i32 of `shape`, which of the row's W new tokens each line's query belongs to: line // part, at most
    width - 1."""
    at = lax.broadcasted_iota(jnp.int32, shape, 0)
    return sum(((at >= w * part).astype(jnp.int32) for w in range(1, width)), jnp.zeros(shape, jnp.int32))


def _written(refs: DecodeRefs, w):
    """Make the copy of tile w to the pool, to be waited for."""
    tile = refs.tiles.at[w]
    return pltpu.make_async_copy(tile, tile, refs.write_sem.at[w])


def _kernel(refs: DecodeRefs, static: Static, unit_pages: int) -> None:
    """Spread q, k and v over lines, attend row after row, gather o from the lines, wait for the writes."""
    static = dataclasses.replace(static, scores=static.scores.scaled(refs.kv_scales))
    pages = refs.pages()
    num_rows, width = refs.num_short[0], static.width
    window = refs.window[0] if static.has_window else None
    num_tokens = num_rows if width == 1 else refs.cu_q_lens[num_rows]
    part = part_heads(static.group, width)
    parts = part, -(-part * width // 8) * 8, range(0, static.num_heads, part)
    decode = Decode(refs, static, pages, unit_pages, num_rows, window, num_tokens, *parts)
    lax.fori_loop(0, cdiv(num_tokens, 16), decode.spread, None)

    cursor = pages.begin((jnp.int32(0), jnp.int32(0), *decode.block_range(0)), decode.announce)
    carry = (jnp.int32(0), cursor) if width == 1 else (jnp.int32(0), cursor, jnp.int32(0))
    _, _, *counted = lax.fori_loop(0, num_rows, decode.one_row, carry)
    written = num_rows if width == 1 else counted[0]

    lax.fori_loop(0, refs.o.shape[-2] // 16, decode.gather, None)
    for w in range(WRITES):

        @pl.when(written > w)
        def _(w=w):
            _written(refs, w).wait()


def part_heads(group: int, width: int) -> int:
    """Return the query heads of a product, all of one KV head, which takes `width` queries of each."""
    return part_of(group, max(1, PART_HEADS // width))


def attend_short(
    tokens: Tokens, rows: Rows, kv: jax.Array, static: Static, blocks: DecodeBlocks, *, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Attend to rows of at most W tokens, which are the first of num_tokens, a multiple of 16.

    Returns o [T, N * V] or [N, T, V], as q is, whose first num_tokens lines are set (zeros after the short rows'), and
    the pool.
    """
    num_heads, width, sinks = static.num_heads, static.width, tokens.sinks
    part, lane_tiles, kv_lines = part_heads(static.group, width), len(static.lane_tiles), kv.shape[1] * kv.shape[2]
    if sinks is not None and width > 1:  # a line for each query of a product
        sinks = jnp.tile(sinks[:num_heads].reshape(-1, 1, part, LANES), (1, width, 1, 1)).reshape(-1, LANES)
        sinks = jnp.pad(sinks, ((0, 8), (0, 0)))
    scratch: dict[str, Any] = {
        "heads": pltpu.VMEM((lane_tiles, num_tokens * num_heads + (width - 1) * part + 16, LANES), jnp.float32),
        "new": pltpu.VMEM((lane_tiles, (num_tokens + width - 1) * kv_lines, LANES), jnp.float32),
        "tiles": pltpu.VMEM((WRITES, *kv.shape[1:3], row_tile(kv.dtype), static.head_dim), kv.dtype),
        "write_sem": pltpu.SemaphoreType.DMA((WRITES,)),
        "ring": ring.scratch(blocks.slots, blocks.pages, kv),
    }
    keys = num_tokens // width * EXPECTED_KEYS  # read once for all queries of a row
    return run_kernel(
        "fa_decode",
        lambda refs: _kernel(DecodeRefs(**refs), static, blocks.unit_pages),
        dataclasses.replace(tokens, sinks=sinks),
        dataclasses.replace(rows, cu_q_lens=rows.cu_q_lens if width > 1 else None, token_page=None),
        kv,
        tokens.outputs(static),
        scratch,
        static=static,
        lines=num_tokens,
        vmem_limit=blocks.vmem_limit,
        pairs=keys * width,
        keys=keys,
    )
