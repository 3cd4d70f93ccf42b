"""Who runs next, with what, and until when.

There is no prefill phase and no decode phase: every running request has `num_computed` tokens chasing `num_tokens`, and
each step spends a budget of tokens over them. Chunked prefill, prefix hits, mixed batches and preemption follow from it.

A row that decodes computes W tokens, its last one and W - 1 drafts, and gains 1 to W. How many is known when the step is
processed, so counters of a row with steps in flight are bounds (scheduler/rows.py).

    add      a request waits
    schedule one step's plan: running rows first, then as many waiting requests as fit
    process  the step's tokens: appended, stop conditions checked, finished requests' pages go to the tree

`schedule` may be called again before `process`: tokens in flight are counted in `num_tokens` and read on the device.

With M data ranks there are M caches, each with pages and a tree of its own; a row has a rank from its admission on. A
rank is an index: the column `rank` of the rows, and numbers [M].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sgl_jax.cache.prefix_cache import Handle, PrefixCache
from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.placement import PLACEMENTS, RankLoads
from sgl_jax.scheduler.policy import POLICIES
from sgl_jax.scheduler.row_pages import RowPages
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import Flag, Param, RowLoad, StepPlan, StepTokens, row_tokens


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits for each data rank: M ranks run M times as many requests and tokens in a step."""

    max_running_requests: int
    context_length: int
    max_step_tokens: int  # budget of a step, at least W for each running request
    max_prefill_tokens: int  # of it, tokens of prompts
    policy: str = "fcfs"  # who is admitted next: scheduler.policy.POLICIES
    placement: str = "cache_aware"  # on which rank: scheduler.placement.PLACEMENTS
    width: Callable[[int], int] = lambda num_decoding: 1  # W of a step whose fullest rank has so many decoding rows

    @functools.cached_property
    def max_width(self) -> int:
        return max(map(self.width, range(1, self.max_running_requests + 1)))

    @property
    def row_tokens(self) -> int:
        """Tokens of KV that a row may take up."""
        return row_tokens(self.context_length, self.max_width)


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
    """The new tokens of a processed step: n of them, those of a row in order."""

    keys: np.ndarray  # i64[n]
    tokens: np.ndarray  # i32[n]
    lines: np.ndarray  # i64[n] where each was sampled, among the plan's S * W lines
    first: list[Request]  # requests that just got their first token
    finished: list[tuple[Request, FinishReason]]
    scored: dict[int, Request]  # by row of the plan, requests whose logprobs, or those of their prompts, were asked for


@dataclasses.dataclass(slots=True)
class _Picks:
    """Rows chosen for the step under construction."""

    width: int  # W
    num_decoding: int  # of the rows, those that decode: the first, by rank
    budget: list[int]  # [M] prompt tokens the step has room for yet, by rank
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    num_new: list[np.ndarray] = dataclasses.field(default_factory=list)
    loads: list[RowLoad] = dataclasses.field(default_factory=list)
    page_updates: list[np.ndarray] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0  # found in the cache by those admitted


class _Taken(NamedTuple):
    """Which of a step's sampled tokens, [n, W], requests take: indices of the two axes."""

    row: np.ndarray | slice
    line: np.ndarray | int


class _Place(NamedTuple):
    """Where a waiting request may go."""

    rank: int
    handle: Handle  # the cached prefix it would start behind
    next_page: _Prefix


type _Prefix = tuple[int, str, bytes]  # rank, namespace, tokens


class Scheduler:
    def __init__(self, config: SchedulerConfig, caches: Sequence[PrefixCache]):
        """One cache for each data rank, alike but for their number of pages."""
        for num_decoding in range(1, config.max_running_requests + 1):
            if config.max_step_tokens < num_decoding * config.width(num_decoding):
                raise ValueError(
                    f"a step of {config.max_step_tokens} tokens cannot hold {num_decoding} decoding requests"
                    f" of {config.width(num_decoding)} tokens each"
                )
        kinds = {(cache.page_size, cache.enabled) for cache in caches}
        if len(kinds) != 1:
            raise ValueError(f"the caches of all ranks must be alike; their (page size, enabled) are {sorted(kinds)}")
        self.config = config
        self.caches = tuple(caches)
        self.table = RowTable(
            len(caches) * config.max_running_requests,
            config.context_length,
            -(-config.row_tokens // caches[0].page_size),
        )
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
        """Tokens that running requests have computed, or may have by the steps in flight."""
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
            kind = np.where(self.table.has_sampled[rows], 0, np.where(num_new <= picks.width, 1, 2))
            order = np.lexsort((kind, self.table.rank[rows]))
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
            decoding = t.has_sampled[run]
            unfinished = t.num_sure[run] < t.max_total[run]
            decode_rows = run[decoding & unfinished]
            of_rank = self._pages.count_by_rank(decode_rows)
            width = self.config.width(max(*of_rank, 1))
            rows, num_new = [decode_rows], [np.full(len(decode_rows), width, np.int32)]
            limits = self.config
            budget = [min(limits.max_step_tokens - n * width, limits.max_prefill_tokens) for n in of_rank]
            for row in run[~decoding & unfinished]:
                rank = t.rank[row]
                n = min(int(t.num_tokens[row] - t.num_computed[row]), budget[rank])
                if n == 0:
                    continue
                rows.append(row[None])
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
            return _Picks(width, 0, budget)
        updates = [self._pages.give(all_rows, need)]
        return _Picks(width, len(decode_rows), budget, [all_rows], [all_new], page_updates=updates)

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
        """Room for all its tokens so far, and for another step of each row the rank runs, lest it be preempted at once."""
        locked_anew = sum(len(n.pages) for n in handle.node.path if n.num_locks == 0)
        page_size, width = self._pages.page_size, self.config.max_width
        need = -(-(len(request.tokens) + width) // page_size) - handle.num_pages
        of_others = num_running * -(-width // page_size)
        return need + of_others <= self.caches[rank].num_available_pages - locked_anew

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
        picks.num_cached_tokens += handle.num_tokens
        needs_state = bool(t.params[row, Param.FLAGS] & (Flag.PENALTIES | Flag.BIAS))
        if handle.num_pages or needs_state:
            pages = handle.pages if handle.num_pages else None
            picks.loads.append(RowLoad(row, pages, request if needs_state else None))
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
        samples = from_device | (end == t.num_tokens[rows])
        of_prompts = {} if picks.num_decoding == len(rows) else self._prompt_columns(rows, num_new, end)
        plan = StepPlan.of(
            num_new,
            num_ranks=len(self.caches),
            width=picks.width,
            keys=t.key[rows],
            rank=t.rank[rows],
            loads=picks.loads + self._pages.take_reloads(),
            num_cached_tokens=picks.num_cached_tokens,
            rows=rows,
            start=start,
            samples=samples,
            from_device=from_device,
            params=t.params[rows],
            page_updates=np.concatenate(picks.page_updates, axis=1)
            if picks.page_updates
            else np.empty((3, 0), np.int32),
            **of_prompts,
        )
        t.num_computed[rows] = end
        sampled = rows[samples]
        t.num_tokens[sampled] = end[samples] + 1
        t.num_sure[sampled] += 1
        t.has_sampled[sampled] = True
        if plan.wants_prompt_logprobs:  # a prompt that is computed is scored
            t.params[sampled, Param.FLAGS] &= ~int(Flag.PROMPT_LOGPROBS)
        return plan

    def _prompt_columns(self, rows: np.ndarray, num_new: np.ndarray, end: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the plan that matter only where a row computes tokens which the host knows."""
        t = self.table
        follows = t.tokens[rows, np.minimum(end, t.tokens.shape[1] - 1)]
        return {
            "next_token": np.where(end < t.prompt_len[rows], follows, np.int32(-1)),
            "tokens": t.next_tokens(rows, num_new),
        }

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

    def process(self, plan: StepPlan, step: StepTokens) -> StepResult:
        """Take in a step's tokens, up to the one at which a request ends. Rows that changed hands are skipped."""
        t = self.table
        alive = t.key[plan.rows] == plan.keys
        scored = self._scored(plan, alive) if step.has_scores else {}
        index = np.flatnonzero(plan.samples & alive)
        rows, tokens, gained = plan.rows[index], step.tokens[index], step.num_accepted[index]
        known = t.num_known[rows]
        first = [t.requests[row] for row in rows[known == t.prompt_len[rows]]]
        if plan.width > 1:  # the bounds close in on what the device accepted, from where it goes on
            rejected = np.where(plan.from_device[index], plan.width, 1) - gained
            t.num_sure[rows] += gained - 1
            t.num_tokens[rows] -= rejected
            t.num_computed[rows] -= rejected

        is_stop = t.stop_ids.take(rows, axis=0)[:, None] == tokens[:, :, None]  # [n, W, stop ids]
        at_stop = np.flatnonzero(is_stop) // (plan.width * t.stop_ids.shape[1])
        at_length = np.flatnonzero(known + gained >= t.max_total[rows])
        may_end = sorted({*at_stop.tolist(), *at_length.tolist()})
        ends = [(i, *self._end(rows[i], tokens[i, : gained[i]])) for i in may_end]
        for i, num_tokens, _ in ends:
            gained[i] = num_tokens

        taken = (
            _Taken(slice(None), 0) if plan.width == 1 else _Taken(*np.nonzero(np.arange(plan.width) < gained[:, None]))
        )
        new_tokens = tokens[taken]
        t.tokens[rows[taken.row], known[taken.row] + taken.line] = new_tokens
        t.num_known[rows] = known + gained
        self.counters.generated_tokens += len(new_tokens)
        return StepResult(
            keys=plan.keys[index][taken.row],
            tokens=new_tokens,
            lines=index[taken.row] * plan.width + taken.line,
            first=[r for r in first if self._announce(r)],
            finished=[(self._finish(int(rows[i])), reason) for i, _, reason in ends if reason is not None],
            scored=scored,
        )

    def _end(self, row: int, tokens: np.ndarray) -> tuple[int, FinishReason | None]:
        """How many of a row's new tokens its request takes, and why it ends with them, if it does."""
        t = self.table
        room = int(t.max_total[row] - t.num_known[row])
        stops = np.flatnonzero(np.isin(tokens[:room], t.stop_ids[row]))
        if len(stops):
            return int(stops[0]) + 1, FinishReason("stop", int(tokens[stops[0]]))
        return (room, FinishReason("length")) if len(tokens) >= room else (len(tokens), None)

    def _finish(self, row: int) -> Request:
        request = self._leave_row(row)
        self._forget(request)
        return request

    def _scored(self, plan: StepPlan, alive: np.ndarray) -> dict[int, Request]:
        """The requests of rows with a flag that asks for logprobs, by row of the plan."""
        wanted = plan.params[:, Param.FLAGS] & (Flag.LOGPROBS | Flag.PROMPT_LOGPROBS) != 0
        found = ((int(i), self.table.requests[plan.rows[i]]) for i in np.flatnonzero(wanted & alive))
        return {i: request for i, request in found if request is not None}

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
        run, width = self._running, self.config.max_width
        assert (t.num_computed[run] <= t.num_tokens[run]).all()
        assert (t.num_known[run] <= t.num_sure[run]).all()
        assert (t.num_sure[run] <= t.num_tokens[run]).all()
        assert (t.num_sure[run] - t.num_known[run] <= 2).all(), "a row has more than two steps in flight"
        in_flight = t.num_tokens[run] - t.num_known[run]
        assert (in_flight <= 2 * width).all(), "more tokens in flight than two steps make"
        assert (t.num_tokens[run] - t.num_computed[run] == 1)[t.has_sampled[run]].all()
        self._pages.check_invariants(run, 2 * (width - 1))
