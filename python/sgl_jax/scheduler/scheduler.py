"""Who runs next, with what, and until when.

There is no prefill phase and no decode phase: every running request has `num_computed` tokens chasing `num_tokens`, and
each step spends a budget of tokens over them. Chunked prefill, prefix hits, mixed batches and preemption follow from it.

    add      a request waits
    schedule one step's plan: running rows first, then as many waiting requests as fit
    process  the step's tokens: appended, stop conditions checked, finished requests' pages go to the tree

`schedule` may be called again before `process`: a token in flight is counted in `num_tokens` and read on the device.

With M data ranks there are M caches, each with pages and a tree of its own; a row has a rank from its admission on. A
rank is an index: the column `rank` of the rows, and numbers [M].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgl_jax.cache.prefix_cache import Handle, PrefixCache
from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.placement import PLACEMENTS, RankLoads
from sgl_jax.scheduler.policy import POLICIES
from sgl_jax.scheduler.row_pages import RowPages
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import Flag, Param, RowLoad, StepPlan


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits are of each data rank: M ranks run M times as many requests and tokens in a step."""

    max_running_requests: int
    context_length: int
    max_step_tokens: int  # budget of a step, at least max_running_requests
    max_prefill_tokens: int  # of it, tokens of prompts
    policy: str = "fcfs"  # who is admitted next: scheduler.policy.POLICIES
    placement: str = "cache_aware"  # on which rank: scheduler.placement.PLACEMENTS


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a processed step means for requests; `index` leads back into the plan's rows."""

    index: np.ndarray  # i64[n] positions in the plan of the rows below
    keys: np.ndarray  # i64[n]
    tokens: np.ndarray  # i32[n]
    first: list[Request]  # these just got their first token
    finished: list[tuple[Request, FinishReason]]


@dataclasses.dataclass(slots=True)
class _Picks:
    """Rows chosen for the step under construction."""

    num_decoding: int  # of the rows, those that decode: the first, by rank
    budget: list[int]  # [M] prompt tokens the step has room for yet, by rank
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    num_new: list[np.ndarray] = dataclasses.field(default_factory=list)
    loads: list[RowLoad] = dataclasses.field(default_factory=list)
    page_updates: list[np.ndarray] = dataclasses.field(default_factory=list)


class _Place(NamedTuple):
    """Where a waiting request may go."""

    rank: int
    handle: Handle  # the cached prefix it would start behind
    next_page: _Prefix


type _Prefix = tuple[int, str, bytes]  # rank, namespace, tokens


class Scheduler:
    def __init__(self, config: SchedulerConfig, caches: Sequence[PrefixCache]):
        """One cache for each data rank, alike but for their number of pages."""
        if config.max_step_tokens < config.max_running_requests:
            raise ValueError(
                f"a step of {config.max_step_tokens} tokens cannot hold {config.max_running_requests} decoding requests"
            )
        kinds = {(cache.page_size, cache.enabled) for cache in caches}
        if len(kinds) != 1:
            raise ValueError(f"the caches of all ranks must be alike; their (page size, enabled) are {sorted(kinds)}")
        self.config = config
        self.caches = tuple(caches)
        self.table = RowTable(len(caches) * config.max_running_requests, config.context_length, caches[0].page_size)
        self._pages = RowPages(self.table, caches)
        self.waiting: dict[int, Request] = {}  # by key
        self.counters = Counters()
        self._requests: dict[int, Request] = {}  # every live request, by key
        self._running = np.empty(0, np.int32)  # rows by rank, within a rank in order of admission

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def num_pages(self) -> int:
        """Usable pages of all ranks."""
        return sum(cache.num_usable_pages for cache in self.caches)

    @property
    def kv_usage(self) -> float:
        """Share of all ranks' pages in use by running requests. A mean: while one rank has room, requests go there."""
        return 1 - sum(cache.num_available_pages for cache in self.caches) / self.num_pages

    @property
    def cached_usage(self) -> float:
        """Share of all ranks' pages that hold cached prefixes no request uses."""
        return sum(cache.num_unused_pages for cache in self.caches) / self.num_pages

    @property
    def num_running_tokens(self) -> int:
        return int(self.table.num_computed[self._running].sum())

    def find(self, key: int) -> Request | None:
        return self._requests.get(key)

    def add(self, request: Request) -> None:
        """Let a request wait. Its max_total_tokens must fit the context, and the context the pool."""
        self._requests[request.key] = self.waiting[request.key] = request

    def flush(self) -> int:
        """Evict every prefix no running request holds, on all ranks; returns how many pages became free."""
        return sum(cache.flush() for cache in self.caches)

    def abort(self, key: int) -> bool:
        """End a request, its pages released; False if there is no such request. A step in flight loses its token."""
        request = self._requests.get(key)
        if request is None:
            return False
        if request.row >= 0:
            self._leave_row(request.row)
        self._forget(request)
        return True

    # --- plan ---------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step and count it as computed; None when no request can run.

        Mutates tables and cache: the plan must be run, and before any later plan.
        """
        preemptions = self.counters.preemptions
        picks = self._pick_running()
        if self.counters.preemptions == preemptions:  # else a victim could return while its token is in flight
            self._admit(picks)
        if not picks.rows:
            return None
        rows = np.concatenate(picks.rows)
        num_new = np.concatenate(picks.num_new)
        if len(rows) > picks.num_decoding:  # else they come in order
            order = np.lexsort((num_new > 1, self.table.rank[rows]))  # by rank, single tokens first
            rows, num_new = rows[order], num_new[order]
        plan = self._build(rows, num_new, picks)
        self._pages.share(rows[~plan.from_device])
        self.counters.steps += 1
        return plan

    def _pick_running(self) -> _Picks:
        """The running rows this step serves, their new pages allocated; preempts the youngest of a rank until they
        fit there."""
        t = self.table
        while True:
            run = self._running
            remaining = t.num_tokens[run] - t.num_computed[run]
            unfinished = t.num_tokens[run] < t.max_total[run]
            decoding = t.has_sampled[run] & (remaining == 1)
            decode_rows = run[decoding & unfinished]
            rows, num_new = [decode_rows], [np.ones(len(decode_rows), np.int32)]
            limits = self.config
            budget = [
                min(limits.max_step_tokens - n, limits.max_prefill_tokens)
                for n in self._pages.count_by_rank(decode_rows)
            ]
            for i in np.flatnonzero(~decoding & unfinished):
                rank = t.rank[run[i]]
                n = min(int(remaining[i]), budget[rank])
                if n == 0:
                    continue
                rows.append(run[i : i + 1])
                num_new.append(np.array([n], np.int32))
                budget[rank] -= n
            all_rows, all_new = np.concatenate(rows), np.concatenate(num_new)
            if len(rows) > 1:
                by_rank = np.argsort(t.rank[all_rows], kind="stable")
                all_rows, all_new = all_rows[by_rank], all_new[by_rank]
            need = self._pages.needed(all_rows, all_new)
            short = self._pages.short_rank(all_rows, need)
            if short is None:
                break
            self._preempt(int(run[t.rank[run] == short][-1]))
        if not len(all_rows):
            return _Picks(0, budget)
        return _Picks(len(decode_rows), budget, [all_rows], [all_new], page_updates=[self._pages.give(all_rows, need)])

    def _admit(self, picks: _Picks) -> None:
        """Seat waiting requests while a rank has budget, rows and pages for the next of them."""
        if not self.waiting or not self.table.num_free:
            return
        being_computed = self._prefixes_being_computed()
        for request in POLICIES[self.config.policy](self.waiting.values(), self.caches):
            place = self._place(request, picks.budget, being_computed)
            if place is None:
                return
            if place.next_page in being_computed:
                continue  # another row of the rank is computing the same page: the next step will find it cached
            self._seat(request, place, picks)
            being_computed.add(place.next_page)

    def _place(self, request: Request, budget: list[int], being_computed: set[_Prefix]) -> _Place | None:
        """The first rank in order of preference that can take it now, or that computes what it should wait for."""
        running = self._pages.count_by_rank(self._running)
        is_open = [b > 0 and n < self.config.max_running_requests for b, n in zip(budget, running, strict=True)]
        if not any(is_open):
            return None
        tokens = self._usable_prefix(request)
        for rank in self._ranks_for(request, tokens, running):
            if is_open[rank]:
                handle = self.caches[rank].match(request.namespace, tokens)
                next_page = self._next_page(request, rank, handle.num_tokens)
                if next_page in being_computed or self._fits(request, handle, rank, running[rank]):
                    return _Place(rank, handle, next_page)
        return None

    def _ranks_for(self, request: Request, tokens: np.ndarray, running: list[int]) -> Sequence[int]:
        """All ranks, the preferred first."""
        if len(self.caches) == 1:
            return (0,)
        loads = RankLoads(running, [cache.num_available_pages for cache in self.caches])
        return PLACEMENTS[self.config.placement](
            request.arrival, loads, lambda rank: self.caches[rank].num_cached(request.namespace, tokens)
        )

    def _usable_prefix(self, request: Request) -> np.ndarray:
        """What may come from the cache: one token must be left to compute, and all of them if each is to be scored."""
        return request.tokens[: 0 if request.wants_prompt_logprobs else len(request.tokens) - 1]

    def _fits(self, request: Request, handle: Handle, rank: int, num_running: int) -> bool:
        """Room for all its tokens so far, and one more page for each row the rank runs, lest it be preempted at once."""
        locked_anew = sum(len(n.pages) for n in handle.node.path if n.num_locks == 0)
        need = -(-(len(request.tokens) + 1) // self._pages.page_size) - handle.num_pages
        return need + num_running <= self.caches[rank].num_available_pages - locked_anew

    def _seat(self, request: Request, place: _Place, picks: _Picks) -> None:
        t = self.table
        rank, handle = place.rank, place.handle
        del self.waiting[request.key]
        row = t.seat(request, rank)
        self._pages.seat(row, handle)
        last_of_rank = np.searchsorted(t.rank[self._running], rank, side="right")
        self._running = np.insert(self._running, last_of_rank, row)
        if not request.admitted:
            request.admitted = True
            request.num_cached_tokens = handle.num_tokens
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += handle.num_tokens
        needs_state = bool(t.params[row, Param.FLAGS] & (Flag.PENALTIES | Flag.BIAS))
        if handle.num_pages or needs_state:
            picks.loads.append(
                RowLoad(
                    row,
                    handle.pages if handle.num_pages else None,
                    request if needs_state else None,
                    num_cached_tokens=handle.num_tokens,
                )
            )
        num_new = min(len(request.tokens) - handle.num_tokens, picks.budget[rank])
        picks.budget[rank] -= num_new
        rows, new = np.array([row], np.int32), np.array([num_new], np.int32)
        picks.rows.append(rows)
        picks.num_new.append(new)
        picks.page_updates.append(self._pages.give(rows, self._pages.needed(rows, new)))

    def _build(self, rows: np.ndarray, num_new: np.ndarray, picks: _Picks) -> StepPlan:
        """Write the plan and advance the rows past it."""
        t = self.table
        start = t.num_computed[rows]
        from_device = t.has_sampled[rows]
        end = start + num_new
        samples = end == t.num_tokens[rows]
        is_prompt = end < t.prompt_len[rows]
        next_token = np.where(is_prompt, t.tokens[rows, np.minimum(end, t.tokens.shape[1] - 1)], -1)
        plan = StepPlan(
            keys=t.key[rows],
            rows=rows,
            rank=t.rank[rows],
            start=start,
            num_new=num_new,
            num_short=np.array(self._pages.count_by_rank(rows[num_new == 1]), np.int32),
            samples=samples,
            from_device=from_device,
            next_token=next_token.astype(np.int32),
            tokens=t.next_tokens(rows, num_new),
            params=t.params[rows],
            page_updates=np.concatenate(picks.page_updates, axis=1)
            if picks.page_updates
            else np.empty((3, 0), np.int32),
            loads=picks.loads + self._pages.take_reloads(),
        )
        sampled = rows[samples]
        t.num_computed[rows] = end
        t.num_tokens[sampled] += 1
        t.has_sampled[sampled] = True
        if plan.wants_prompt_logprobs:  # a prompt that is computed is scored
            t.params[sampled, Param.FLAGS] &= ~int(Flag.PROMPT_LOGPROBS)
        return plan

    def _prefixes_being_computed(self) -> set[_Prefix]:
        """The prefix each row in prefill is about to complete."""
        t = self.table
        prefilling = self._running[~t.has_sampled[self._running]]
        requests = [r for r in map(t.requests.__getitem__, prefilling) if r]
        return {self._next_page(r, int(t.rank[r.row]), int(t.num_computed[r.row])) for r in requests}

    def _next_page(self, request: Request, rank: int, num_computed: int) -> _Prefix:
        """A prefix, named by its tokens: up to the end of the page that comes next. Unique if the page stays partial."""
        end = (num_computed // self._pages.page_size + 1) * self._pages.page_size
        if not self._pages.are_shared or end > len(request.tokens) - 1:
            return rank, f"{request.key}", b""
        return rank, request.namespace, request.tokens[:end].tobytes()

    def _preempt(self, row: int) -> None:
        """Back to waiting, pages released (the tree keeps what it can). A token in flight is dropped and sampled anew:
        sampling depends on seed and position alone."""
        self.counters.preemptions += 1
        request = self._leave_row(row)
        self.waiting[request.key] = request

    def _leave_row(self, row: int) -> Request:
        self._pages.release(row)
        self._running = self._running[self._running != row]
        return self.table.unseat(row)

    def _forget(self, request: Request) -> None:
        self.waiting.pop(request.key, None)
        del self._requests[request.key]

    # --- results ------------------------------------------------------------------------------------------------------

    def process(self, plan: StepPlan, sampled: np.ndarray) -> StepResult:
        """Take in a step's tokens: sampled i32[S], meaningful where plan.samples. Rows that changed hands are skipped."""
        t = self.table
        index = np.flatnonzero(plan.samples & (t.key[plan.rows] == plan.keys))
        rows, tokens = plan.rows[index], sampled[index]
        known = t.num_known[rows]
        first = [t.requests[row] for row in rows[known == t.prompt_len[rows]]]
        t.tokens[rows, known] = tokens
        t.num_known[rows] = known + 1
        self.counters.generated_tokens += len(rows)

        stopped = (t.stop_ids[rows] == tokens[:, None]).any(1)
        ended = stopped | (known + 1 >= t.max_total[rows])
        finished = []
        for i in np.flatnonzero(ended):
            reason = FinishReason("stop", int(tokens[i])) if stopped[i] else FinishReason("length")
            request = self._leave_row(int(rows[i]))
            self._forget(request)
            finished.append((request, reason))
        return StepResult(index, plan.keys[index], tokens, [r for r in first if self._announce(r)], finished)

    def _announce(self, request: Request | None) -> bool:
        assert request is not None
        request.announced, was = True, request.announced
        return not was

    def check_invariants(self) -> None:
        """Raises AssertionError unless every page and row has exactly one owner and every counter is in order."""
        t = self.table
        assert len(self._running) + t.num_free == len(self.caches) * self.config.max_running_requests
        assert max(self._pages.count_by_rank(self._running)) <= self.config.max_running_requests
        assert (np.diff(t.rank[self._running]) >= 0).all()
        assert len(self.waiting) + len(self._running) == len(self._requests)
        run = self._running
        assert (t.num_computed[run] <= t.num_tokens[run]).all()
        in_flight = t.num_tokens[run] - t.num_known[run]
        assert ((in_flight >= 0) & (in_flight <= 2)).all(), "more tokens in flight than steps"
        self._pages.check_invariants(run)
