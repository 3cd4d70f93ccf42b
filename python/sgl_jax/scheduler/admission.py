"""Admission of waiting requests: finding a data rank with budget, a row and pages, and the prefix that is cached there."""

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
    """Rank for a waiting request."""

    rank: int
    handle: Handle  # the cached prefix that it starts behind
    next_page: Prefix


type Prefix = tuple[int, str, bytes]  # rank, namespace, tokens


class Admission:
    """Finds places for waiting requests. Changes only the ages of cached prefixes."""

    def __init__(self, config: SchedulerConfig, caches: Sequence[PrefixCache], table: RowTable, pages: RowPages):
        self._config, self._caches, self._table, self._pages = config, caches, table, pages

    def place(
        self, request: Request, budget: list[int], running_rows: np.ndarray, being_computed: set[Prefix]
    ) -> Place | None:
        """Return the first rank, in order of preference, that can take the request now, or that is computing a prefix which
        the request should wait for."""
        running = self._pages.count_by_rank(running_rows)
        is_open = [b > 0 and n < self._config.max_running_requests for b, n in zip(budget, running, strict=True)]
        if not any(is_open):
            return None
        # The last token is computed in any case, for its logits; all are if the prompt is to be scored.
        needs_all = request.wants_prompt_logprobs or request.needs_all
        tokens = request.tokens[: 0 if needs_all else len(request.tokens) - 1]
        for rank in self._ranks_for(request, tokens, running):
            if is_open[rank]:
                handle = self._caches[rank].match(request.namespace, tokens)
                next_page = self._next_page(request, rank, handle.num_tokens)
                if next_page in being_computed or self._fits(request, handle, rank, running[rank]):
                    return Place(rank, handle, next_page)
        return None

    def most_rows(self, running_rows: np.ndarray, num_waiting: int) -> int:
        """Return the most rows that a rank can have in this step: those of prompts and of requests to be admitted, too."""
        return min(max(self._pages.count_by_rank(running_rows)) + num_waiting, self._config.max_running_requests)

    def prefixes_being_computed(self, running_rows: np.ndarray) -> set[Prefix]:
        """Return, for each row that has not sampled yet, its prefix up to the end of the first page that is not computed."""
        t = self._table
        prefilling = running_rows[~t.has_sampled[running_rows]]
        requests = [r for r in map(t.requests.__getitem__, prefilling) if r]
        return {self._next_page(r, int(t.rank[r.row]), int(t.num_computed[r.row])) for r in requests}

    def _ranks_for(self, request: Request, tokens: np.ndarray, running: list[int]) -> Sequence[int]:
        """Return all ranks, the preferred one first."""
        if len(self._caches) == 1:
            return (0,)
        loads = RankLoads(running, [cache.num_available_pages for cache in self._caches])
        order = PLACEMENTS[self._config.placement]
        return order(request.arrival, loads, lambda rank: self._caches[rank].num_cached(request.namespace, tokens))

    def _fits(self, request: Request, handle: Handle, rank: int, num_running: int) -> bool:
        """True if there is room for all tokens of the request and for another step of each row that the rank runs. With less,
        the request would be preempted at once."""
        locked_anew = sum(len(n.pages) for n in handle.node.path if n.num_locks == 0)
        page_size, width = self._pages.page_size, self._config.width
        decodes = len(request.tokens) + 1 < request.max_total_tokens  # the next token comes without a step of its own
        end = len(request.tokens) + decodes * width + self._config.lookahead
        need = -(-end // page_size) - handle.num_pages
        need_of_others = num_running * -(-width // page_size)
        return need + need_of_others <= self._caches[rank].num_available_pages - locked_anew

    def _next_page(self, request: Request, rank: int, num_computed: int) -> Prefix:
        """Return the prefix up to the end of the first page that is not computed. If the request does not fill that page, the
        result equals no other request's."""
        end = (num_computed // self._pages.page_size + 1) * self._pages.page_size
        if not self._pages.are_shared or request.needs_all or end > len(request.tokens) - 1:
            return rank, f"{request.key}", b""
        return rank, request.namespace, request.tokens[:end].tobytes()
