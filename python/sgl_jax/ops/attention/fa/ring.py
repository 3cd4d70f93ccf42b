"""A ring of VMEM slots that blocks of pages are copied into ahead of use.

Work is a sequence of items, each a block of a row's pages. An item passes three stages. It is announced: its row, block
and span of pages are noted in SMEM and the copy of its page ids starts (page tables stay in HBM, as 512 rows of 128k
tokens are more than SMEM holds). Later its ids are there and the copies of its pages start; later still it is attended
to. Item n uses slot n % slots of each ring, and copies run ahead across rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

IDS = 128  # page ids copied at a time; a block lies within one such group
FIELDS = 4  # an item's row, block, first page, page after the last

Ref = Any  # a pallas Ref: an array in HBM, VMEM or SMEM
Cursor = tuple[jax.Array, ...]  # how many items have been announced, then what says which one is next


def div(x: Any, n: int) -> Any:
    """Return x // n for x >= 0: one instruction for powers of two, where jax's own takes four."""
    return lax.shift_right_logical(x, jnp.int32(n.bit_length() - 1)) if n & (n - 1) == 0 else lax.div(x, jnp.int32(n))


def rem(x: Any, n: int) -> Any:
    """Return x % n for x >= 0."""
    return x & (n - 1) if n & (n - 1) == 0 else lax.rem(x, jnp.int32(n))


def cdiv(x: Any, n: int) -> Any:
    return div(x + (n - 1), n)


@dataclasses.dataclass(frozen=True)
class PageRing:
    kv: Ref  # HBM [LP, K, planes, page, H]
    table: Ref  # HBM i32[S * groups * IDS]: each row's page ids, padded to whole groups
    buffer: Ref  # VMEM [slots, pages, K, planes, page, H]
    page_sem: Ref  # DMA [slots]
    ids: Ref  # SMEM i32[items * IDS]
    id_sem: Ref  # DMA [items]
    items: Ref  # SMEM i32[items * FIELDS]
    groups: int  # groups of IDS page ids in a row of the table
    first_page: jax.Array  # first page of the layer

    @property
    def slots(self) -> int:
        return self.buffer.shape[0]

    @property
    def pages(self) -> int:
        return self.buffer.shape[1]

    @property
    def block_tokens(self) -> int:
        return self.pages * self.buffer.shape[4]

    @property
    def num_items(self) -> int:
        return self.ids.shape[0] // IDS

    def announce(self, n: jax.Array, row: jax.Array, block: jax.Array, first: jax.Array, end: jax.Array) -> None:
        """Note item n, pages [first, end) of a block, counted in the row, and start the copy of its page ids."""
        at = rem(n, self.num_items)
        for field, value in enumerate((row, block, first, end)):
            self.items[at * FIELDS + field] = value
        self._id_copy(at, row, block).start()

    def _id_copy(self, at: jax.Array, row: jax.Array, block: jax.Array):
        group = row * self.groups + div(block, IDS // self.pages)
        source = self.table.at[pl.ds(pl.multiple_of(group * IDS, IDS), IDS)]
        target = self.ids.at[pl.ds(pl.multiple_of(at * IDS, IDS), IDS)]
        return pltpu.make_async_copy(source, target, self.id_sem.at[at])

    def page_id(self, n: jax.Array, page: jax.Array) -> jax.Array:
        """Return the pool's line of a page of item n, counted in the row."""
        return self.ids[rem(n, self.num_items) * IDS + rem(page, IDS)] + self.first_page

    def begin(self, cursor: Cursor, announce: Callable[[Cursor], Cursor]) -> Cursor:
        """Fill the ring before any item is attended to: note num_items - 1 items, and start the page copies of the first
        slots - 1. `announce(cursor)` notes the item at the cursor and returns the next cursor."""
        cursor = lax.fori_loop(0, self.num_items - 1, lambda _, c: announce(c), cursor)
        lax.fori_loop(0, self.slots - 1, lambda n, _: self.start(n, cursor[0]), None)
        return cursor

    def advance(self, n: jax.Array, cursor: Cursor, announce: Callable[[Cursor], Cursor]) -> tuple[jax.Array, Cursor]:
        """Start the copies of a later item, wait for item n, and return its slot. `announce` comes after the waits, where
        the compiler schedules it among the products."""
        self.start(n + (self.slots - 1), cursor[0])
        slot = self.wait(n)
        return slot, announce(cursor)

    def start(self, n: jax.Array, announced: jax.Array) -> None:
        """Start the copies of item n's pages, if it is among the announced ones. Its slot must be free."""
        pl.when(n < announced)(lambda: self._start(n))

    def _start(self, n: jax.Array) -> None:
        at, slot = rem(n, self.num_items), rem(n, self.slots)
        row, block, first, end = (self.items[at * FIELDS + field] for field in range(FIELDS))
        self._id_copy(at, row, block).wait()
        skipped = first - block * self.pages
        ids = at * IDS + rem(first, IDS)

        def copy(j, _=None):
            source = self.kv.at[self.ids[ids + j] + self.first_page]
            pltpu.make_async_copy(source, self.buffer.at[slot, skipped + j], self.page_sem.at[slot]).start()

        def copy_all():  # without a loop the scalar unit overlaps the copies' set-up: 3 bundles a page, not 10
            for j in range(self.pages):
                copy(j)

        lax.cond(end - first == self.pages, copy_all, lambda: lax.fori_loop(0, end - first, copy, None))

    def wait(self, n: jax.Array) -> jax.Array:
        """Wait until item n's pages are there. Returns its slot."""
        at, slot = rem(n, self.num_items), rem(n, self.slots)
        count = self.items[at * FIELDS + 3] - self.items[at * FIELDS + 2]
        # A semaphore counts bytes: a wait for 2^i pages at a time takes log(pages) turns.
        size = 1
        while size <= self.pages:

            @pl.when((count & size) != 0)
            def _(size=size):
                some = self.buffer.at[slot, pl.ds(0, size)]
                pltpu.make_async_copy(some, some, self.page_sem.at[slot]).wait()

            size *= 2
        return slot


def scratch(slots: int, pages: int, kv: jax.Array) -> dict[str, Any]:
    """Return the scratch of a PageRing by field."""
    items = 2 * slots
    return {
        "buffer": pltpu.VMEM((slots, pages, *kv.shape[1:]), kv.dtype),
        "page_sem": pltpu.SemaphoreType.DMA((slots,)),
        "ids": pltpu.SMEM((items * IDS,), jnp.int32),
        "id_sem": pltpu.SemaphoreType.DMA((items,)),
        "items": pltpu.SMEM((items * FIELDS,), jnp.int32),
    }
