"""K and V of rows after the short ones, from packed lines to pages in the pool.

A row's first new token may lie anywhere in its page and anywhere in the packed tokens, so lines are shifted on their way:
they are copied in as float32, read at an offset, and put between what a half new page held before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa.prepare import Prepare
from sgl_jax.ops.attention.fa.ring import Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import LANES

ALIGN = 16  # packed lines are copied from multiples of this


@dataclasses.dataclass(frozen=True)
class WriteRefs:
    """A segment is `pages` consecutive pages of a row, the first a multiple of `pages`. M tokens of a segment, W lines
    that surely hold them, C = H / 128."""

    num_short: Ref  # SMEM i32[1]: rows that are left to the decode kernel
    first_page: Ref  # SMEM i32[1]: of the layer
    kv_lens: Ref  # SMEM i32[S]
    cu_q_lens: Ref  # SMEM i32[S + 1]
    token_page: Ref  # SMEM i32[T]
    k: Ref  # HBM [T, K * H]
    v: Ref | None  # HBM [T, K * H]
    k_norm: Ref | None  # VMEM [1, H]
    rope: Ref | None  # HBM f32[T, H]
    kv: Ref  # HBM [LP, K, planes, page, H]
    lines: Ref  # VMEM [slots, planes, W, K * H]
    line_sem: Ref  # DMA [slots]
    shifted: Ref  # VMEM f32[planes, K, C, M + W + M, 128]
    segments: Ref  # VMEM [slots, pages, K, planes, page, H]
    old_sem: Ref  # DMA [slots]
    new_sem: Ref  # DMA [slots]
    counts: Ref  # SMEM i32[slots]: pages of the slot on their way to the pool
    rope_lines: Ref = None  # VMEM f32[slots, W, H]


def write_scratch(kv: jax.Array, q: jax.Array, rope: jax.Array | None, slots: int, pages: int) -> dict[str, Any]:
    _, num_kv_heads, planes, page_size, head_dim = kv.shape
    tokens = pages * page_size
    lines = min(tokens + ALIGN, q.shape[-2])
    return {
        "lines": pltpu.VMEM((slots, planes, lines, num_kv_heads * head_dim), q.dtype),
        "line_sem": pltpu.SemaphoreType.DMA((slots,)),
        "shifted": pltpu.VMEM((planes, num_kv_heads, head_dim // LANES, lines + 2 * tokens, LANES), jnp.float32),
        "segments": pltpu.VMEM((slots, pages, *kv.shape[1:]), kv.dtype),
        "old_sem": pltpu.SemaphoreType.DMA((slots,)),
        "new_sem": pltpu.SemaphoreType.DMA((slots,)),
        "counts": pltpu.SMEM((slots,), jnp.int32),
    } | ({"rope_lines": pltpu.VMEM((slots, lines, head_dim), jnp.float32)} if rope is not None else {})


def write_chunks(refs: WriteRefs, prepare: Prepare) -> None:
    """Write all of them, and wait until they are in the pool."""
    num_rows = refs.kv_lens.shape[0]
    slots, pages, num_kv_heads, planes, page_size, head_dim = refs.segments.shape
    tokens = pages * page_size
    num_lines = refs.lines.shape[2]
    last_token = refs.cu_q_lens[num_rows]
    lane_tiles = range(head_dim // LANES)

    def new_range(row):
        """Positions [first, end) of the row's new tokens."""
        end = refs.kv_lens[row]
        return end - (refs.cu_q_lens[row + 1] - refs.cu_q_lens[row]), end

    def is_row(row):
        return (row < num_rows) & (refs.cu_q_lens[jnp.minimum(row, num_rows)] < last_token)

    def page_range(row, segment):
        """Pages of the segment with new tokens, counted in the row."""
        first, end = new_range(row)
        low = jnp.maximum(div(first, page_size), segment * pages)
        return low, jnp.minimum(cdiv(end, page_size), (segment + 1) * pages)

    def step(cursor):
        """(number, row, segment) -> the next."""
        n, row, segment = cursor
        _, end = new_range(row)
        more = (segment + 1) * tokens < end
        row = jnp.where(more, row, row + 1)
        first, _ = new_range(jnp.minimum(row, num_rows - 1))
        return n + 1, row, jnp.where(more, segment + 1, div(first, tokens))

    def copies(n, row, segment):
        """The lines' copies, and where in them the segment's first token lies (perhaps before the first)."""
        slot = rem(n, slots)
        token = segment * tokens - refs.kv_lens[row] + refs.cu_q_lens[row + 1]
        base = jnp.clip(div(jnp.maximum(token, 0), ALIGN) * ALIGN, 0, refs.k.shape[0] - num_lines)
        at = pl.ds(pl.multiple_of(base, ALIGN), num_lines)
        new = [refs.k] if refs.v is None else [refs.k, refs.v]
        pairs = [(x, refs.lines.at[slot, which]) for which, x in enumerate(new)]
        if refs.rope is not None:
            pairs.append((refs.rope, refs.rope_lines.at[slot]))
        return [pltpu.make_async_copy(x.at[at], to, refs.line_sem.at[slot]) for x, to in pairs], token - base

    def page_copy(n, row, segment, page, to_pool):
        slot = rem(n, slots)
        first, _ = new_range(row)
        token = jnp.maximum(page * page_size, first) - refs.kv_lens[row] + refs.cu_q_lens[row + 1]
        pool = refs.kv.at[refs.token_page[token] + refs.first_page[0]]
        mine = refs.segments.at[slot, page - segment * pages]
        if to_pool:
            return pltpu.make_async_copy(mine, pool, refs.new_sem.at[slot])
        return pltpu.make_async_copy(pool, mine, refs.old_sem.at[slot])

    def for_half_new_pages(row, segment, do):
        first, end = new_range(row)

        def one(page, _):
            @pl.when((page * page_size < first) | ((page + 1) * page_size > end))
            def _():
                do(page)

        lax.fori_loop(*page_range(row, segment), one, None)

    def drain(slot):
        one = refs.segments.at[slot, 0]
        wait = lambda _, __: pltpu.make_async_copy(one, one, refs.new_sem.at[slot]).wait()  # noqa: E731
        lax.fori_loop(0, refs.counts[slot], wait, None)

    def fetch(cursor):
        n, row, segment = cursor

        @pl.when(is_row(row))
        def _():
            @pl.when(n >= slots)
            def _():
                drain(rem(n, slots))

            for copy in copies(n, row, segment)[0]:
                copy.start()
            for_half_new_pages(row, segment, lambda page: page_copy(n, row, segment, page, False).start())

        return lax.cond(is_row(row), step, lambda c: c, cursor)

    def write(carry):
        cursor, ahead = carry
        n, row, segment = cursor
        slot = rem(n, slots)
        lines, offset = copies(n, row, segment)
        for copy in lines:
            copy.wait()
        for_half_new_pages(row, segment, lambda page: page_copy(n, row, segment, page, False).wait())
        rope = refs.rope_lines[slot] if refs.rope is not None else None
        for which in range(planes):
            for h in range(num_kv_heads):
                x = refs.lines[slot, which, :, h * head_dim : (h + 1) * head_dim].astype(jnp.float32)
                if which == 0:
                    x = prepare(x, refs.k_norm, rope)
                for c in lane_tiles:
                    refs.shifted[which, h, c, pl.ds(tokens, num_lines)] = x[:, c * LANES : (c + 1) * LANES]
        first, end = new_range(row)
        low, high = page_range(row, segment)

        def one_page(page, _):
            j = page - segment * pages
            place = page * page_size + lax.broadcasted_iota(jnp.int32, (page_size, LANES), 0)
            new = (place >= first) & (place < end)
            for which in range(planes):
                for h in range(num_kv_heads):
                    for c in lane_tiles:
                        x = refs.shifted[which, h, c, pl.ds(tokens + offset + j * page_size, page_size)]
                        at = slot, j, h, which, slice(None), slice(c * LANES, (c + 1) * LANES)
                        old = refs.segments[at].astype(jnp.float32)
                        refs.segments[at] = jnp.where(new, x, old).astype(refs.segments.dtype)
            page_copy(n, row, segment, page, True).start()

        lax.fori_loop(low, high, one_page, None)
        refs.counts[slot] = high - low
        return step(cursor), fetch(ahead)

    row = refs.num_short[0]
    first, _ = new_range(jnp.minimum(row, num_rows - 1))
    cursor = (jnp.int32(0), row, div(first, tokens))
    ahead = lax.fori_loop(0, slots // 2, lambda _, c: fetch(c), cursor)
    (n, _, _), _ = lax.while_loop(lambda carry: is_row(carry[0][1]), write, (cursor, ahead))

    def finish(i, _):
        drain(rem(i, slots))

    lax.fori_loop(jnp.maximum(n - slots, 0), n, finish, None)
