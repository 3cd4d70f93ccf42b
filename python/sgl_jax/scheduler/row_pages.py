"""Pages of running rows: the first ones are shared with the prefix tree, others are allocated as the row grows."""

from collections.abc import Sequence

import numpy as np

from sgl_jax.cache.prefix_cache import Handle, PrefixCache
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import RowLoad


class RowPages:
    def __init__(self, table: RowTable, caches: Sequence[PrefixCache], lookahead: int = 0):
        """`caches`: one for each data rank, alike except in their number of pages. `lookahead`: tokens for which a row has
        pages beyond those that it computes."""
        self.page_size, self.are_shared = caches[0].page_size, caches[0].enabled
        self._table, self._lookahead = table, lookahead
        self._caches = tuple(caches)
        self._handles: dict[int, Handle] = {}  # running row -> its locked prefix
        self._reload: set[int] = set()  # rows in whose page table the tree has replaced pages

    def seat(self, row: int, prefix: Handle) -> None:
        """Put a cached prefix in front of a new row, and lock it."""
        t = self._table
        self._caches[t.rank[row]].lock(prefix)
        self._handles[row] = prefix
        t.num_computed[row] = prefix.num_tokens
        t.num_pages[row] = prefix.num_pages
        t.page_table[row, : prefix.num_pages] = prefix.pages

    def release(self, row: int) -> None:
        """Free the row's pages; whole pages that are computed stay in the tree."""
        t = self._table
        self._hand_over(row)
        handle, cache = self._handles.pop(row), self._caches[t.rank[row]]
        self._reload.discard(row)
        cache.free(t.page_table[row, handle.num_pages : t.num_pages[row]])
        cache.unlock(handle)

    def count_by_rank(self, rows: np.ndarray) -> list[int]:
        """Count the rows of each rank, [M]."""
        if len(self._caches) == 1:
            return [len(rows)]
        return np.bincount(self._table.rank[rows], minlength=len(self._caches)).tolist()

    # --- growing ------------------------------------------------------------------------------------------------------

    def needed(self, rows: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """Return how many more pages rows[i] needs for num_new[i] tokens. Rejected drafts leave a row with spare pages."""
        end = self._table.num_computed[rows] + num_new + self._lookahead
        return np.maximum(-(-end // self.page_size) - self._table.num_pages[rows], 0)

    def short_rank(self, rows: np.ndarray, need: np.ndarray) -> int | None:
        """Return the first rank that cannot give each of its rows need[i] pages, or None."""
        if need.sum() <= min(cache.num_available_pages for cache in self._caches):
            return None
        wanted = self.count_by_rank(np.repeat(rows, need))
        short = (rank for rank, cache in enumerate(self._caches) if wanted[rank] > cache.num_available_pages)
        return next(short, None)

    def give(self, rows: np.ndarray, need: np.ndarray) -> np.ndarray:
        """Append need[i] pages of its rank to the table of rows[i]. Rows come in order of rank, and the ranks must have the
        pages. Return the page updates, i32[3, need.sum()]."""
        t = self._table
        each = np.repeat(np.arange(len(rows)), need)
        if not len(each):
            return np.empty((3, 0), np.int32)
        counts = self.count_by_rank(rows[each])
        allocated = [cache.allocate(n) for cache, n in zip(self._caches, counts, strict=True)]
        pages = np.concatenate([found for found in allocated if found is not None])  # none is: short_rank was asked
        first = np.cumsum(need) - need
        index = t.num_pages[rows][each] + np.arange(len(pages)) - first[each]
        t.page_table[rows[each], index] = pages
        t.num_pages[rows] += need
        return np.stack([rows[each], index, pages]).astype(np.int32)

    # --- sharing ------------------------------------------------------------------------------------------------------

    def share(self, rows: np.ndarray) -> None:
        """Put the rows' whole pages into the tree. Pages of a planned step count as computed: steps run in order, so later
        plans may read them."""
        for row in rows.tolist():
            self._hand_over(row)

    def _hand_over(self, row: int) -> None:
        """Give the tree the row's whole computed pages, and use the tree's own where it has the same tokens already."""
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
        """Return loads of the page tables in which the tree has replaced pages since the last call."""
        t, rows = self._table, sorted(self._reload)
        self._reload.clear()
        return [RowLoad(row, t.page_table[row, : t.num_pages[row]].copy(), None) for row in rows]

    def check_invariants(self, running: np.ndarray, num_rejected: int) -> None:
        """Raise AssertionError unless every page has exactly one owner, and every row has pages for its computed tokens and
        at most num_rejected more."""
        t = self._table
        assert sorted(self._handles) == sorted(running.tolist())
        owned: list[list[np.ndarray]] = [[] for _ in self._caches]
        for row, handle in self._handles.items():
            owned[t.rank[row]].append(t.page_table[row, handle.num_pages : t.num_pages[row]])
            assert np.array_equal(t.page_table[row, : handle.num_pages], handle.pages)
        for cache, pages in zip(self._caches, owned, strict=True):
            cache.check_invariants(pages)
        most, num_pages = t.num_computed[running] + num_rejected + self._lookahead, t.num_pages[running]
        assert (num_pages >= -(-t.num_computed[running] // self.page_size)).all()
        assert (num_pages <= -(-most // self.page_size)).all()
