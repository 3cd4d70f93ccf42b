"""The pages of running rows: shared with the tree at the front, given one by one as they grow, and given back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgl_jax.cache.prefix_cache import Handle, PrefixCache
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import RowLoad


class RowPages:
    def __init__(self, table: RowTable, caches: Sequence[PrefixCache]):
        """One cache for each data rank, alike but for their number of pages."""
        self.page_size, self.are_shared = caches[0].page_size, caches[0].enabled
        self._table = table
        self._caches = tuple(caches)
        self._handles: dict[int, Handle] = {}  # the locked prefix of each running row
        self._reload: set[int] = set()  # rows whose page table changed under them

    def seat(self, row: int, prefix: Handle) -> None:
        """A row just seated starts behind a cached prefix."""
        t = self._table
        self._caches[t.rank[row]].lock(prefix)
        self._handles[row] = prefix
        t.num_computed[row] = prefix.num_tokens
        t.num_pages[row] = prefix.num_pages
        t.page_table[row, : prefix.num_pages] = prefix.pages

    def release(self, row: int) -> None:
        """All of them; the tree keeps what is computed of whole pages."""
        t = self._table
        self._hand_over(row)
        handle, cache = self._handles.pop(row), self._caches[t.rank[row]]
        self._reload.discard(row)
        cache.free(t.page_table[row, handle.num_pages : t.num_pages[row]])
        cache.unlock(handle)

    def count_by_rank(self, rows: np.ndarray) -> list[int]:
        """How many of the rows each rank has, [M]."""
        if len(self._caches) == 1:
            return [len(rows)]
        return np.bincount(self._table.rank[rows], minlength=len(self._caches)).tolist()

    # --- growing ------------------------------------------------------------------------------------------------------

    def needed(self, rows: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """How many more pages each row needs for num_new[i] tokens. It may have some already, given for drafts that were
        rejected."""
        end = self._table.num_computed[rows] + num_new
        return np.maximum(-(-end // self.page_size) - self._table.num_pages[rows], 0)

    def short_rank(self, rows: np.ndarray, need: np.ndarray) -> int | None:
        """The first rank that cannot give its rows need[i] pages each."""
        if need.sum() <= min(cache.num_available_pages for cache in self._caches):
            return None
        wanted = self.count_by_rank(np.repeat(rows, need))
        short = (rank for rank, cache in enumerate(self._caches) if wanted[rank] > cache.num_available_pages)
        return next(short, None)

    def give(self, rows: np.ndarray, need: np.ndarray) -> np.ndarray:
        """Append pages of their rank to the tables of rows in order of rank, need[i] to rows[i]; the ranks must have
        them. Returns the updates, i32[3, need.sum()]."""
        t = self._table
        each = np.repeat(np.arange(len(rows)), need)
        if not len(each):
            return np.empty((3, 0), np.int32)
        pages = self._allocate(rows[each])
        first = np.cumsum(need) - need
        index = t.num_pages[rows][each] + np.arange(len(pages)) - first[each]
        t.page_table[rows[each], index] = pages
        t.num_pages[rows] += need
        return np.stack([rows[each], index, pages]).astype(np.int32)

    def _allocate(self, rows: np.ndarray) -> np.ndarray:
        """A page of its rank for each of these rows, which come in order of rank; i32[len(rows)]."""
        pages = [cache.allocate(n) for cache, n in zip(self._caches, self.count_by_rank(rows), strict=True)]
        return np.concatenate([p for p in pages if p is not None])  # none is: the caller looked

    # --- sharing ------------------------------------------------------------------------------------------------------

    def share(self, rows: np.ndarray) -> None:
        """Put the whole pages that rows have computed, or will in a step that is planned, into the tree: steps run in
        order, so later plans may read them."""
        for row in rows.tolist():
            self._hand_over(row)

    def _hand_over(self, row: int) -> None:
        t = self._table
        num_pages = min(int(t.num_computed[row]), int(t.num_known[row])) // self.page_size
        handle = self._handles[row]
        if num_pages <= handle.num_pages or not self.are_shared:
            return
        pages = t.page_table[row, :num_pages].copy()
        tokens = t.tokens[row, : num_pages * self.page_size]
        handle = self._handles[row] = self._caches[t.rank[row]].extend(handle, tokens, pages)
        if not np.array_equal(handle.pages, pages):
            t.page_table[row, :num_pages] = handle.pages
            self._reload.add(row)

    def take_reloads(self) -> list[RowLoad]:
        """Page tables that the device has to read anew: the tree had pages of the same tokens already."""
        t, rows = self._table, sorted(self._reload)
        self._reload.clear()
        return [RowLoad(row, t.page_table[row, : t.num_pages[row]].copy(), None) for row in rows]

    def check_invariants(self, running: np.ndarray, num_rejected: int) -> None:
        """Raises AssertionError unless every page has exactly one owner, and every row pages for what it computes and
        perhaps for num_rejected tokens more."""
        t = self._table
        assert sorted(self._handles) == sorted(running.tolist())
        owned: list[list[np.ndarray]] = [[] for _ in self._caches]
        for row, handle in self._handles.items():
            owned[t.rank[row]].append(t.page_table[row, handle.num_pages : t.num_pages[row]])
            assert np.array_equal(t.page_table[row, : handle.num_pages], handle.pages)
        for cache, pages in zip(self._caches, owned, strict=True):
            cache.check_invariants(pages)
        computed, num_pages = t.num_computed[running], t.num_pages[running]
        assert (num_pages >= -(-computed // self.page_size)).all()
        assert (num_pages <= -(-(computed + num_rejected) // self.page_size)).all()
