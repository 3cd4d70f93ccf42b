"""Short rows, of at most W new tokens: one program over all of them, row after row, block of pages after block.

q, o and the new K and V of all rows lie in VMEM. All queries of a row go through its keys together, so these are read once.
A block that holds places of new tokens gets them in VMEM, before it is attended to, and the few pool rows around them go
back to HBM.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa import ring
from sgl_jax.ops.attention.fa.blocks import DecodeBlocks
from sgl_jax.ops.attention.fa.prepare import Operands, Prepare
from sgl_jax.ops.attention.fa.ring import PageRing, Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import (
    FLOOR,
    LANES,
    Scalars,
    Scores,
    attend,
    join_pages,
    of_head,
    part_of,
    row_tile,
    views,
)

WRITES = 4  # tiles on their way back to the pool
UNROLLED_HEADS = 32  # of more heads, each is a turn of a loop where they are handled one by one
PART_HEADS = 128  # query heads of a product at most
ALONE = 2  # cuts of the keys of a block where there is but one product, for want of another to run beside its softmax


@dataclasses.dataclass(frozen=True)
class Refs:
    """The refs of the kernel. R tokens, a multiple of 16; C = H / 128 lane tiles. V is H, or less where the pool has one
    plane, whose first V columns are the values; q and o may have heads before tokens (tile.of_head). A part is the heads
    of a product."""

    num_short: Ref  # SMEM i32[1]: rows of at most W tokens
    first_page: Ref  # SMEM i32[1]: of the layer
    window: Ref  # SMEM i32[1]
    kv_scales: Ref | None  # SMEM f32[2]
    kv_lens: Ref  # SMEM i32[S]
    cu_q_lens: Ref  # SMEM i32[S + 1]; None where W = 1, whose row s is token s
    q: Ref  # VMEM [R, N * H]
    k: Ref  # VMEM [R, K * H]
    v: Ref | None  # VMEM [R, K * H]
    sinks: Ref | None  # VMEM f32[N + 8, 128]
    q_norm: Ref | None  # VMEM [1, H]: weight of the norm
    k_norm: Ref | None
    rope: Ref | None  # VMEM f32[R, H]: cos and sin (api.QKPrepare)
    table: Ref
    o: Ref  # VMEM [R, N * V]
    kv: Ref  # HBM
    heads: Ref  # VMEM f32[C, R * N + pad, 128]: q by (part, token, head of the part); o takes its place row by row
    new: Ref  # VMEM f32[C, R * K * planes + pad, 128]: K and V by (token, KV head, which)
    tiles: Ref  # VMEM [WRITES, K, planes, row tile, H]
    write_sem: Ref  # DMA [WRITES]
    ring: dict[str, Ref]


def _kernel(
    refs: Refs,
    *,
    num_heads: int,
    width: int,
    groups: int,
    unit_pages: int,
    scores: Scores,
    prepare: Prepare,
    has_window: bool,
):
    scores = scores.scaled(refs.kv_scales)
    pages = PageRing(**refs.ring, kv=refs.kv, table=refs.table, groups=groups, first_page=refs.first_page[0])
    _, num_kv_heads, planes, page_size, head_dim = refs.kv.shape
    value_dim = refs.o.shape[-1] if refs.o.ndim == 3 else refs.o.shape[-1] // num_heads
    group = num_heads // num_kv_heads
    part = part_heads(group, width)
    part_rows = -(-part * width // 8) * 8
    first_heads = range(0, num_heads, part)
    block_tokens = pages.pages * page_size
    dtype = scores.dtype
    num_rows = refs.num_short[0]
    window = refs.window[0]
    lane_tiles, value_tiles = range(head_dim // LANES), range(value_dim // LANES)
    num_tokens = num_rows if width == 1 else refs.cu_q_lens[num_rows]

    def new_tokens(row):
        """Return the first new token of a row, and how many it has."""
        if width == 1:
            return row, 1
        first = refs.cu_q_lens[row]
        return first, refs.cu_q_lens[row + 1] - first

    def line_of(token, head):
        """Return the line of a token's head in refs.heads: (index of the part * R + token) * part + head of the part."""
        index = head // part if isinstance(head, int) else div(head, part)
        return token * part + (index * (refs.o.shape[-2] - 1) * part + head)

    def query(shape):
        """Return the query of each line of a product, counted in its row."""
        at = lax.broadcasted_iota(jnp.int32, shape, 0)
        return sum(((at >= w * part).astype(jnp.int32) for w in range(1, width)), jnp.zeros(shape, jnp.int32))

    def for_heads(do):
        lax.fori_loop(0, num_heads, do, None, unroll=num_heads <= UNROLLED_HEADS)

    def spread(r, _):
        """Put 16 tokens of [R, heads * H] into their lines."""
        at = pl.ds(pl.multiple_of(r * 16, 16), 16)
        rope = refs.rope[at, :] if refs.rope is not None else None

        def put(target, lines, x):
            for c in lane_tiles:
                target[c, lines] = x[:, c * LANES : (c + 1) * LANES]

        def load(source, head):
            return source[of_head(source.shape, at, head, head_dim)].astype(jnp.float32)

        def one_head(n, _):
            x = prepare(load(refs.q, n), refs.q_norm, rope)
            put(refs.heads, pl.ds(line_of(r * 16, n), 16, stride=part), x)

        for_heads(one_head)
        for h in range(num_kv_heads):
            line, stride = (r * 16 * num_kv_heads + h) * planes, planes * num_kv_heads
            put(refs.new, pl.ds(line, 16, stride=stride), prepare(load(refs.k, h), refs.k_norm, rope))
            if refs.v is not None:
                put(refs.new, pl.ds(line + 1, 16, stride=stride), load(refs.v, h))

    lax.fori_loop(0, cdiv(num_tokens, 16), spread, None)

    def first_key(row):
        """Return the first key that the row's first query sees."""
        earlier = new_tokens(row)[1] - 1
        return jnp.maximum(refs.kv_lens[row] - earlier - window, 0) if has_window else jnp.int32(0)

    def block_range(row):
        return div(first_key(row), block_tokens), cdiv(refs.kv_lens[row], block_tokens)

    def announce(cursor):
        """Announce the item at the cursor and step on. (items announced, row, block, the row's last block + 1)"""
        n, row, block, end = cursor

        @pl.when(row < num_rows)
        def _():
            first = div(first_key(row), page_size)
            last = cdiv(refs.kv_lens[row], page_size)
            offset = block * pages.pages
            pages.announce(n, row, block, jnp.maximum(first, offset), jnp.minimum(last, offset + pages.pages))

        n = n + (row < num_rows).astype(jnp.int32)
        more = block + 1 < end
        row = jnp.where(more, row, row + 1)
        new_block, new_end = block_range(jnp.minimum(row, refs.kv_lens.shape[0] - 1))
        return n, row, jnp.where(more, block + 1, new_block), jnp.where(more, end, new_end)

    def start(n, announced):
        @pl.when(n < announced)
        def _():
            pages.start(n)

    cursor = (jnp.int32(0), jnp.int32(0), *block_range(0))
    cursor = lax.fori_loop(0, pages.notice, lambda _, c: announce(c), cursor)
    lax.fori_loop(0, pages.lead, lambda n, _: start(n, cursor[0]), None)

    def one_row(row, carry):
        n, cursor, *counted = carry
        written = row if width == 1 else counted[0]  # row tiles
        kv_len, first = refs.kv_lens[row], first_key(row)
        begin, end = block_range(row)
        token, number = new_tokens(row)
        new = NewTokens(token, number, refs.kv_lens[row] - number)
        lines = [pl.ds(line_of(token, head), part_rows) for head in first_heads]
        q = [jnp.concatenate([refs.heads[c, at] for c in lane_tiles], 1).astype(dtype) for at in lines]
        position = jnp.full((part_rows, LANES), new.position)
        factor = scores.factor(position if width == 1 else position + query(position.shape))

        def fresh(head):
            if refs.sinks is None:
                top, total = jnp.full((part_rows, LANES), FLOOR), jnp.zeros((part_rows, LANES), jnp.float32)
            else:
                top = refs.sinks[head * width : head * width + part_rows] / factor
                total = jnp.full((part_rows, LANES), 1 / LANES, jnp.float32)  # lanes are summed at the end
            return top, total, jnp.zeros((part_rows, value_dim), jnp.float32)

        def fetch(n, cursor):
            start(n + pages.lead, cursor[0])
            slot = pages.wait(n)
            return slot, announce(cursor)  # after the waits, where it is scheduled among the products

        def over(state, slot, first_page, count, keep):
            cuts = ALONE if len(first_heads) == 1 and part_rows > 8 and keep is None and count % ALONE == 0 else 1
            some = count // cuts

            def load(h, first, which):
                return join_pages(pages.buffer, slot, first_page + first, some, h, which, value_dim)

            def keys(h):
                return [functools.partial(load, h, first) for first in range(0, count, some)]

            return attend(state, q, [keys(head // group) for head in first_heads], keep, scores, factor)

        def whole(state, slot):
            return over(state, slot, 0, pages.pages, None)

        def edge(state, slot, block):
            unit = unit_pages * page_size
            base = block * block_tokens
            low, high = jnp.maximum(first - base, 0), jnp.minimum(kv_len - base, block_tokens)

            def step(u, state):
                def keep(shape, axis):
                    at = u * unit + lax.broadcasted_iota(jnp.int32, shape, axis)
                    if width > 1 and axis == 1:
                        last = new.position - base + query(shape)
                        return (at <= last) & (at > last - window) if has_window else at <= last
                    return (at >= low) & (at < high) if has_window else at < high

                return over(state, slot, u * unit_pages, unit_pages, keep)

            return lax.fori_loop(div(low, unit), cdiv(high, unit), step, state)

        all_see = first if width == 1 else kv_len - window  # the first key that no query's window leaves out

        def inner(block, carry):
            n, cursor, state = carry
            slot, cursor = fetch(n, cursor)
            if has_window:
                is_whole = block * block_tokens >= all_see
                state = lax.cond(is_whole, lambda s: whole(s, slot), lambda s: edge(s, slot, block), state)
            else:
                state = whole(state, slot)
            return n + 1, cursor, state

        def with_new(block, carry):
            n, cursor, written, state = carry
            slot, cursor = fetch(n, cursor)
            written = _insert(refs, pages, new, n, slot, block, written, width)
            if width == 1:
                is_whole = kv_len == end * block_tokens
            else:
                is_whole = new.position + 1 >= (block + 1) * block_tokens
            if has_window:
                is_whole &= block * block_tokens >= all_see
            state = lax.cond(is_whole, lambda s: whole(s, slot), lambda s: edge(s, slot, block), state)
            return n + 1, cursor, written, state

        state = [fresh(head) for head in first_heads]
        first_new = end - 1 if width == 1 else div(new.position, block_tokens)
        n, cursor, state = lax.fori_loop(begin, first_new, inner, (n, cursor, state))
        carry = n, cursor, written, state
        if width == 1:
            n, cursor, written, state = with_new(end - 1, carry)
        else:
            n, cursor, written, state = lax.fori_loop(first_new, end, with_new, carry)
        for (_, total, acc), at in zip(state, lines, strict=True):
            out = acc / jnp.sum(total, axis=1, keepdims=True) * scores.v_scale
            for c in value_tiles:
                x = out[:, c * LANES : (c + 1) * LANES]
                if width == 1:
                    refs.heads[c, pl.ds(at.start, part)] = x[:part]
                else:  # later lines are queries of rows to come
                    mine = lax.broadcasted_iota(jnp.int32, x.shape, 0) < number * part
                    refs.heads[c, at] = jnp.where(mine, x, refs.heads[c, at])
        return (n, cursor) if width == 1 else (n, cursor, written)

    carry = (jnp.int32(0), cursor) if width == 1 else (jnp.int32(0), cursor, jnp.int32(0))
    _, _, *counted = lax.fori_loop(0, num_rows, one_row, carry)
    written = num_rows if width == 1 else counted[0]

    def gather(r, _):
        """Bring 16 tokens of o back to [R, N * H]; zeros after the last row."""
        at = pl.ds(pl.multiple_of(r * 16, 16), 16)
        live = r * 16 + lax.broadcasted_iota(jnp.int32, (16, LANES), 0) < num_tokens

        def one_head(n, _):
            lines = pl.ds(line_of(r * 16, n), 16, stride=part)
            x = jnp.concatenate([jnp.where(live, refs.heads[c, lines], 0) for c in value_tiles], 1)
            refs.o[of_head(refs.o.shape, at, n, value_dim)] = x.astype(refs.o.dtype)

        for_heads(one_head)

    lax.fori_loop(0, refs.o.shape[-2] // 16, gather, None)
    for w in range(WRITES):

        @pl.when(written > w)
        def _(w=w):
            _written(refs, w).wait()


def _written(refs: Refs, w):
    tile = refs.tiles.at[w]
    return pltpu.make_async_copy(tile, tile, refs.write_sem.at[w])


class NewTokens(NamedTuple):
    """The new tokens of a row."""

    token: jax.Array  # the first one's place in the packed tokens
    number: jax.Array | int
    position: jax.Array  # the first one's place in the row


def _insert(refs: Refs, pages: PageRing, new: NewTokens, n, slot, block, written, width: int):
    """Put the row's new K and V into a block, item n, and send the row tiles around them back to the pool. Returns how
    many tiles have been sent in all."""
    _, num_kv_heads, planes, page_size, head_dim = refs.kv.shape
    height = refs.tiles.shape[3]
    block_tokens = pages.pages * page_size

    def one_tile(place, written):
        """Handle the tile of a place in the row: that of the new token where W = 1, else the tile's first."""
        page = div(place, page_size)
        offset = rem(place, page_size)
        top = pl.multiple_of(div(offset, height) * height, height)
        first = offset - top if width == 1 else new.position - place  # of the new tokens, counted in the tile
        w = rem(written, WRITES)

        @pl.when(written >= WRITES)
        def _():
            _written(refs, w).wait()

        line = lax.broadcasted_iota(jnp.int32, (height, head_dim), 0)
        heres = [line == first, *(line == jnp.where(i < new.number, first + i, -1) for i in range(1, width))]
        for h in range(num_kv_heads):
            for which in range(planes):
                at = slot, page - block * pages.pages, h, which, pl.ds(top, height)
                tile = pages.buffer[at].astype(jnp.float32)
                for i, here in enumerate(heres):
                    source = pl.ds(((new.token + i) * num_kv_heads + h) * planes + which, 1)
                    x = jnp.concatenate([refs.new[c, source] for c in range(head_dim // LANES)], 1)
                    tile = jnp.where(here, x, tile)
                tile = tile.astype(pages.buffer.dtype)
                pages.buffer[at] = tile
                refs.tiles[w, h, which] = tile
        target = refs.kv.at[pages.page_id(n, page), :, :, pl.ds(top, height)]
        pltpu.make_async_copy(refs.tiles.at[w], target, refs.write_sem.at[w]).start()
        return written + 1

    if width == 1:
        return one_tile(new.position, written)
    first = jnp.maximum(new.position, block * block_tokens)
    end = jnp.minimum(new.position + new.number, (block + 1) * block_tokens)
    return lax.fori_loop(
        div(first, height), cdiv(end, height), lambda tile, written: one_tile(tile * height, written), written
    )


def part_heads(group: int, width: int) -> int:
    """The query heads of a product, all of one KV head, which takes `width` queries of each."""
    return part_of(group, max(1, PART_HEADS // width))


def attend_short(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv: jax.Array,
    scalars: Scalars,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    table: jax.Array,
    sinks: jax.Array | None,
    prepare: Operands,
    *,
    num_heads: int,
    value_dim: int,
    num_tokens: int,
    width: int,
    scores: Scores,
    has_window: bool,
    blocks: DecodeBlocks,
) -> tuple[jax.Array, jax.Array]:
    """Attend to rows of at most `width` tokens, which are the first of num_tokens, a multiple of 16.

    q [T, N * H] or [N, T, H], k and v [T, K * H] (v None for a pool of one plane); or, without k and v, q fused
    (tile.views). table i32[S * groups * IDS], sinks f32[N + 8, 128].

    Returns o [T, N * value_dim] or [N, T, value_dim], whose first num_tokens lines are set (zeros after the short rows'),
    and the pool.
    """
    _, num_kv_heads, planes, _, head_dim = kv.shape
    lane_tiles = head_dim // LANES
    height = row_tile(kv.dtype)
    part = part_heads(num_heads // num_kv_heads, width)
    if sinks is not None and width > 1:  # a line for each query of a product
        sinks = jnp.tile(sinks[:num_heads].reshape(-1, 1, part, LANES), (1, width, 1, 1)).reshape(-1, LANES)
        sinks = jnp.pad(sinks, ((0, 8), (0, 0)))
    scratch: dict[str, Any] = {
        "heads": pltpu.VMEM((lane_tiles, num_tokens * num_heads + (width - 1) * part + 16, LANES), jnp.float32),
        "new": pltpu.VMEM((lane_tiles, (num_tokens + width - 1) * num_kv_heads * planes, LANES), jnp.float32),
        "tiles": pltpu.VMEM((WRITES, num_kv_heads, planes, height, head_dim), kv.dtype),
        "write_sem": pltpu.SemaphoreType.DMA((WRITES,)),
        "ring": ring.scratch(blocks.slots, blocks.pages, kv),
    }
    optional = {"k": k, "v": v, "sinks": sinks, "q_norm": prepare.q_norm, "k_norm": prepare.k_norm}
    optional["rope"] = prepare.rope
    prefetch = scalars.given() | {"kv_lens": kv_lens} | ({"cu_q_lens": cu_q_lens} if width > 1 else {})
    missing = [name for name, x in (optional | scalars._asdict()).items() if x is None]
    missing += ["cu_q_lens"] if width == 1 else []
    optional = {name: x for name, x in optional.items() if x is not None}
    names = [*prefetch, "q", *optional, "table"]

    def body(*args):
        *plain, _kv_in, o, kv_out, rest = args
        fields: dict[str, Any] = dict(zip(names, plain, strict=True)) | dict.fromkeys(missing)
        if k is None:
            fields |= views(fields["q"], num_heads, num_kv_heads)
        kernel(Refs(**fields, o=o, kv=kv_out, **rest))

    kernel = functools.partial(
        _kernel,
        num_heads=num_heads,
        width=width,
        groups=table.shape[0] // (kv_lens.shape[0] * ring.IDS),
        unit_pages=blocks.unit_pages,
        scores=scores,
        prepare=prepare.spec,
        has_window=has_window,
    )
    per_head = (num_heads, q.shape[1], value_dim)
    out = jax.ShapeDtypeStruct(per_head if q.ndim == 3 else (q.shape[0], num_heads * value_dim), q.dtype)

    def rows(x):
        shape = (*x.shape[:-2], num_tokens, x.shape[-1])
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))

    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    inputs = [q, *optional.values(), table, kv]
    keys = num_tokens // width * blocks.expected_keys  # read once for all queries of a row
    return pl.pallas_call(
        body,
        out_shape=[out, jax.ShapeDtypeStruct(kv.shape, kv.dtype)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(1,),
            in_specs=[
                rows(q),
                *(rows(x) if name in ("k", "v", "rope") else whole for name, x in optional.items()),
                hbm,
                hbm,
            ],
            out_specs=[rows(out), hbm],
            scratch_shapes=[scratch],
        ),
        input_output_aliases={len(prefetch) + len(inputs) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, disable_semaphore_checks=True, vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * keys * width * num_heads * (head_dim + value_dim),
            transcendentals=keys * width * num_heads,
            bytes_accessed=planes * keys * num_kv_heads * head_dim * kv.dtype.itemsize
            + (q.size + out.size) * q.dtype.itemsize,
        ),
        name="fa_decode",
    )(*prefetch.values(), *inputs)
