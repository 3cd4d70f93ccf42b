"""K and V of rows after the short ones, from packed lines to pages in the pool.

A row's first new token may lie anywhere in its page and anywhere in the packed tokens, so lines are shifted on their way:
they are copied in, widened to float32, read at an offset, and merged with the old tokens of a page that is partly new.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa.kernel_call import Refs, Static
from sgl_jax.ops.attention.fa.ring import Ref, cdiv, div, rem
from sgl_jax.ops.attention.fa.tile import LANES

ALIGN = 16  # packed lines are copied from multiples of this


@dataclasses.dataclass(frozen=True)
class Writer:
    """The work and its scratch. A segment is `pages` consecutive pages of a row, the first a multiple of `pages`. M tokens of
    a segment, W lines that surely hold them, C = H / 128. A cursor is (number, row, segment)."""

    refs: Refs
    static: Static
    last_token: jax.Array  # the first of the padding
    lines: Ref  # VMEM [slots, planes, W, K * H]
    line_sem: Ref  # DMA [slots]
    shifted: Ref  # VMEM f32[planes, K, C, M + W + M, 128]
    segments: Ref  # VMEM [slots, pages, K, planes, page, H]
    old_sem: Ref  # DMA [slots]
    new_sem: Ref  # DMA [slots]
    counts: Ref  # SMEM i32[slots]: pages of the slot on their way to the pool
    rope_lines: Ref = None  # VMEM f32[slots, W, H]

    @property
    def slots(self) -> int:
        return self.segments.shape[0]

    @property
    def pages(self) -> int:
        return self.segments.shape[1]

    @property
    def tokens(self) -> int:
        return self.pages * self.static.page_size

    def write_all(self) -> None:
        """Write the new K and V of all rows, and wait until they are in the pool."""
        row = self.refs.num_short[0]
        first, _ = self._new_range(jnp.minimum(row, self.refs.kv_lens.shape[0] - 1))
        cursor = (jnp.int32(0), row, div(first, self.tokens))
        ahead = lax.fori_loop(0, self.slots // 2, lambda _, c: self._fetch(c), cursor)
        (n, _, _), _ = lax.while_loop(lambda carry: self._is_row(carry[0][1]), self._write_segment, (cursor, ahead))
        lax.fori_loop(jnp.maximum(n - self.slots, 0), n, lambda i, _: self._drain(rem(i, self.slots)), None)

    def _is_row(self, row):
        num_rows = self.refs.kv_lens.shape[0]
        return (row < num_rows) & (self.refs.cu_q_lens[jnp.minimum(row, num_rows)] < self.last_token)

    def _new_range(self, row):
        """Return the positions [first, end) of the row's new tokens."""
        end = self.refs.kv_lens[row]
        return end - (self.refs.cu_q_lens[row + 1] - self.refs.cu_q_lens[row]), end

    def _page_range(self, row, segment):
        """Return the pages of the segment with new tokens, counted in the row."""
        first, end = self._new_range(row)
        low = jnp.maximum(div(first, self.static.page_size), segment * self.pages)
        return low, jnp.minimum(cdiv(end, self.static.page_size), (segment + 1) * self.pages)

    def _next(self, cursor):
        """Return the cursor (number, row, segment) of the next segment."""
        n, row, segment = cursor
        _, end = self._new_range(row)
        more = (segment + 1) * self.tokens < end
        row = jnp.where(more, row, row + 1)
        first, _ = self._new_range(jnp.minimum(row, self.refs.kv_lens.shape[0] - 1))
        return n + 1, row, jnp.where(more, segment + 1, div(first, self.tokens))

    def _line_copies(self, cursor):
        """Make the copies of the segment's lines. Returns them, and the index in them of the segment's first token, which is
        negative where the row begins later."""
        n, row, segment = cursor
        slot, num_lines = rem(n, self.slots), self.lines.shape[2]
        token = segment * self.tokens - self.refs.kv_lens[row] + self.refs.cu_q_lens[row + 1]
        base = jnp.clip(div(jnp.maximum(token, 0), ALIGN) * ALIGN, 0, self.refs.k.shape[0] - num_lines)
        at = pl.ds(pl.multiple_of(base, ALIGN), num_lines)
        new = [self.refs.k] if self.refs.v is None else [self.refs.k, self.refs.v]
        pairs = [(x, self.lines.at[slot, which]) for which, x in enumerate(new)]
        if self.refs.rope is not None:
            pairs.append((self.refs.rope, self.rope_lines.at[slot]))
        return [pltpu.make_async_copy(x.at[at], to, self.line_sem.at[slot]) for x, to in pairs], token - base

    def _page_copy(self, cursor, page, to_pool: bool):
        """Make the copy of a page of the segment to the pool, or from it."""
        n, row, segment = cursor
        slot = rem(n, self.slots)
        first, _ = self._new_range(row)
        token = jnp.maximum(page * self.static.page_size, first) - self.refs.kv_lens[row] + self.refs.cu_q_lens[row + 1]
        pool = self.refs.kv.at[self.refs.token_page[token] + self.refs.first_page[0]]
        mine = self.segments.at[slot, page - segment * self.pages]
        if to_pool:
            return pltpu.make_async_copy(mine, pool, self.new_sem.at[slot])
        return pltpu.make_async_copy(pool, mine, self.old_sem.at[slot])

    def _for_half_new_pages(self, cursor, do: Callable[[Any], None]) -> None:
        """Call do(copy from the pool) for each page of the segment that the new tokens do not fill."""
        _, row, segment = cursor
        first, end = self._new_range(row)

        def one(page, _):
            @pl.when((page * self.static.page_size < first) | ((page + 1) * self.static.page_size > end))
            def _():
                do(self._page_copy(cursor, page, to_pool=False))

        lax.fori_loop(*self._page_range(row, segment), one, None)

    def _drain(self, slot) -> None:
        """Wait until the slot's pages are in the pool."""
        one = self.segments.at[slot, 0]
        copy = pltpu.make_async_copy(one, one, self.new_sem.at[slot])
        lax.fori_loop(0, self.counts[slot], lambda *_: copy.wait(), None)

    def _fetch(self, cursor):
        """Start the copies that a segment needs, if there is one at the cursor. Returns the next cursor."""
        n, row, _ = cursor

        @pl.when(self._is_row(row))
        def _():
            @pl.when(n >= self.slots)
            def _():
                self._drain(rem(n, self.slots))

            for copy in self._line_copies(cursor)[0]:
                copy.start()
            self._for_half_new_pages(cursor, lambda copy: copy.start())

        return lax.cond(self._is_row(row), self._next, lambda c: c, cursor)

    def _write_segment(self, carry):
        """Shift the lines of the segment at the cursor into its pages, send these to the pool, fetch a later segment."""
        cursor, ahead = carry
        n, row, segment = cursor
        slot = rem(n, self.slots)
        copies, offset = self._line_copies(cursor)
        for copy in copies:
            copy.wait()
        self._for_half_new_pages(cursor, lambda copy: copy.wait())
        self._spread_lines(slot)
        first, end = self._new_range(row)
        low, high = self._page_range(row, segment)

        def one_page(page, _):
            j = page - segment * self.pages
            position = page * self.static.page_size + lax.broadcasted_iota(jnp.int32, (self.static.page_size, LANES), 0)
            self._merge_page(slot, j, offset, (position >= first) & (position < end))
            self._page_copy(cursor, page, to_pool=True).start()

        lax.fori_loop(low, high, one_page, None)
        self.counts[slot] = high - low
        return self._next(cursor), self._fetch(ahead)

    def _spread_lines(self, slot) -> None:
        """Put the slot's lines into self.shifted as float32, K normed and rotated."""
        num_lines, head_dim = self.lines.shape[2], self.static.head_dim
        rope = self.rope_lines[slot] if self.refs.rope is not None else None
        for which in range(self.static.planes):
            for h in range(self.static.num_kv_heads):
                x = self.lines[slot, which, :, h * head_dim : (h + 1) * head_dim].astype(jnp.float32)
                if which == 0:
                    x = self.static.prepare(x, self.refs.k_norm, rope)
                for c in self.static.lane_tiles:
                    self.shifted[which, h, c, pl.ds(self.tokens, num_lines)] = x[:, c * LANES : (c + 1) * LANES]

    def _merge_page(self, slot, j, offset, new: jax.Array) -> None:
        """Put the new tokens of page j of the segment among those that it held before."""
        page_size = self.static.page_size
        for which in range(self.static.planes):
            for h in range(self.static.num_kv_heads):
                for c in self.static.lane_tiles:
                    x = self.shifted[which, h, c, pl.ds(self.tokens + offset + j * page_size, page_size)]
                    at = slot, j, h, which, slice(None), slice(c * LANES, (c + 1) * LANES)
                    old = self.segments[at].astype(jnp.float32)
                    self.segments[at] = jnp.where(new, x, old).astype(self.segments.dtype)


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
