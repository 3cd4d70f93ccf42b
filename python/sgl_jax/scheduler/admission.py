"""Where a waiting request may go: a data rank with budget, a row and pages for it, behind the prefix that is cached there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgl_jax.cache.prefix_cache import Handle, PrefixCache
from sgl_jax.request import Request
from sgl_jax.scheduler.rank_order import PLACEMENTS, RankLoads
from sgl_jax.scheduler.row_pages import RowPages
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.scheduler.scheduler_config import SchedulerConfig


class Place(NamedTuple):
    """Where a waiting request may go."""

    rank: int
    handle: Handle  # the cached prefix it would start behind
    next_page: Prefix


type Prefix = tuple[int, str, bytes]  # rank, namespace, tokens


class Admission:
    def __init__(self, config: SchedulerConfig, caches: Sequence[PrefixCache], table: RowTable, pages: RowPages):
        self._config, self._caches, self._table, self._pages = config, caches, table, pages

    def place(
        self, request: Request, budget: list[int], running_rows: np.ndarray, being_computed: set[Prefix]
    ) -> Place | None:
        """The first rank in order of preference that can take it now, or that computes what it should wait for."""
        running = self._pages.count_by_rank(running_rows)
        is_open = [b > 0 and n < self._config.max_running_requests for b, n in zip(budget, running, strict=True)]
        if not any(is_open):
            return None
        tokens = self._usable_prefix(request)
        for rank in self._ranks_for(request, tokens, running):
            if is_open[rank]:
                handle = self._caches[rank].match(request.namespace, tokens)
                next_page = self._next_page(request, rank, handle.num_tokens)
                if next_page in being_computed or self._fits(request, handle, rank, running[rank]):
                    return Place(rank, handle, next_page)
        return None

    def prefixes_being_computed(self, running_rows: np.ndarray) -> set[Prefix]:
        """The prefix each row in prefill is about to complete."""
        t = self._table
        prefilling = running_rows[~t.has_sampled[running_rows]]
        requests = [r for r in map(t.requests.__getitem__, prefilling) if r]
        return {self._next_page(r, int(t.rank[r.row]), int(t.num_computed[r.row])) for r in requests}

    def _ranks_for(self, request: Request, tokens: np.ndarray, running: list[int]) -> Sequence[int]:
        """All ranks, the preferred first."""
        if len(self._caches) == 1:
            return (0,)
        loads = RankLoads(running, [cache.num_available_pages for cache in self._caches])
        return PLACEMENTS[self._config.placement](
            request.arrival, loads, lambda rank: self._caches[rank].num_cached(request.namespace, tokens)
        )

    def _usable_prefix(self, request: Request) -> np.ndarray:
        """The tokens that may come from the cache: all but one, or none if each is to be scored."""
        return request.tokens[: 0 if request.wants_prompt_logprobs else len(request.tokens) - 1]

    def _fits(self, request: Request, handle: Handle, rank: int, num_running: int) -> bool:
        """Room for all its tokens so far, and for another step of each row the rank runs, lest it be preempted at once."""
        locked_anew = sum(len(n.pages) for n in handle.node.path if n.num_locks == 0)
        page_size, width = self._pages.page_size, self._config.max_width
        need = -(-(len(request.tokens) + width) // page_size) - handle.num_pages
        of_others = num_running * -(-width // page_size)
        return need + of_others <= self._caches[rank].num_available_pages - locked_anew

    def _next_page(self, request: Request, rank: int, num_computed: int) -> Prefix:
        """A prefix, named by its tokens: up to the end of the page that comes next. Unique if the page stays partial."""
        end = (num_computed // self._pages.page_size + 1) * self._pages.page_size
        if not self._pages.are_shared or end > len(request.tokens) - 1:
            return rank, f"{request.key}", b""
        return rank, request.namespace, request.tokens[:end].tobytes()
