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
from collections.abc import Sequence

import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.request import Request
from sgl_jax.scheduler.admission import Admission, Place
from sgl_jax.scheduler.policy import POLICIES
from sgl_jax.scheduler.results import StepResult, take_tokens
from sgl_jax.scheduler.row_pages import RowPages
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.step_plan import Flag, Param, RowLoad, StepPlan, StepTokens


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


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
            -(-config.row_capacity // caches[0].page_size),
        )
        self._pages = RowPages(self.table, caches)
        self._admission = Admission(config, self.caches, self.table, self._pages)
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
        being_computed = self._admission.prefixes_being_computed(self._running)
        for request in POLICIES[self.config.policy](self.waiting.values(), self.caches):
            place = self._admission.place(request, picks.budget, self._running, being_computed)
            if place is None:
                return
            if place.next_page in being_computed:
                continue  # another row of the rank is computing the same page: the next step will find it cached
            self._seat(request, place, picks)
            being_computed.add(place.next_page)

    def _seat(self, request: Request, place: Place, picks: _Picks) -> None:
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
        rows = plan.rows[index]
        first = [t.requests[row] for row in rows[t.num_known[rows] == t.prompt_len[rows]]]
        taken = take_tokens(t, plan, step, index)
        self.counters.generated_tokens += len(taken.tokens)
        return StepResult(
            keys=plan.keys[index][taken.of],
            tokens=taken.tokens,
            lines=index[taken.of] * plan.width + taken.line,
            first=[r for r in first if self._announce(r)],
            finished=[(self._finish(int(rows[i])), reason) for i, reason in taken.ends],
            scored=scored,
        )

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
