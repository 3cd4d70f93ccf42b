"""Scheduling: which rows run in a step, with how many tokens, and when a request ends.

There is no prefill phase and no decode phase. Every running request has `num_computed` tokens chasing `num_tokens`, and
each step spends a token budget over them. Chunked prefill, prefix hits, mixed batches and preemption follow from it.

    add      lets a request wait
    schedule plans a step: running rows first, then as many waiting requests as fit
    process  takes in the step's tokens and ends requests; the pages of finished ones go to the prefix tree

`schedule` may run again before `process`: tokens in flight count in `num_tokens` and are read on the device. A decoding row
computes W tokens, its last one and W - 1 drafts, and gains 1 to W of them. The number is known only in `process`, so the
counters of a row with steps in flight are bounds (scheduler/rows.py).

With M data ranks there are M caches, each with its own pages and prefix tree. A row belongs to a rank from its admission on.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.request import Grammar, Request
from sgl_jax.scheduler.adapter_slots import AdapterSlots
from sgl_jax.scheduler.admission import Admission, Place
from sgl_jax.scheduler.counters import Counters
from sgl_jax.scheduler.grammar_rows import CompiledGrammar, GrammarRows
from sgl_jax.scheduler.picks import Picks
from sgl_jax.scheduler.policy import POLICIES
from sgl_jax.scheduler.results import StepResult, scored_requests, started_requests, take_tokens, verified_drafts
from sgl_jax.scheduler.row_pages import RowPages
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.scheduler.widths import Widths
from sgl_jax.step_plan import Param, RowFlag, RowLoad, StepPlan, StepTokens, pages_per_row


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        caches: Sequence[PrefixCache],
        widths: Widths | None = None,
        adapters: AdapterSlots | None = None,
        find_grammar: Callable[[Grammar], CompiledGrammar | None] | None = None,
    ):
        """`caches`: one for each data rank, alike except in their number of pages. `widths`: other ones than the config's.
        `adapters`, `find_grammar`: None in a launch that takes none; the function is as for GrammarRows."""
        self._widths = widths or Widths(config.width, config.wide_rows, config.draft_cost)
        for num_decoding in range(1, config.max_running_requests + 1):
            if config.max_step_tokens < num_decoding * self._widths(num_decoding):
                raise ValueError(
                    f"a step of {config.max_step_tokens} tokens cannot hold {num_decoding} decoding requests"
                    f" of {self._widths(num_decoding)} tokens each"
                )
        kinds = {(cache.page_size, cache.enabled) for cache in caches}
        if len(kinds) != 1:
            raise ValueError(f"the caches of all ranks must be alike; their (page size, enabled) are {sorted(kinds)}")
        self.config, self.caches = config, tuple(caches)
        num_pages = pages_per_row(config.context_length, config.width, caches[0].page_size, config.lookahead)
        self.table = RowTable(len(caches) * config.max_running_requests, config.context_length, num_pages)
        self._pages = RowPages(self.table, caches, config.lookahead)
        self._admission = Admission(config, self.caches, self.table, self._pages)
        self.adapters = adapters or AdapterSlots()
        self.grammars = GrammarRows(self.table, find_grammar or (lambda grammar: None))
        self.waiting: dict[int, Request] = {}  # by key
        self.counters = Counters(accepted_per_position=[0] * (config.width - 1))
        self.requests: dict[int, Request] = {}  # every live request, by key
        self._is_full = False  # the last admission ended for want of pages or rows, not of budget
        self._blocked: Request | None = None  # for which it ended
        self._running = np.empty(0, np.int32)  # rows by rank, within a rank in order of admission

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    @property
    def num_pages(self) -> int:
        """Usable pages of all ranks."""
        return sum(cache.num_usable_pages for cache in self.caches)

    @property
    def kv_usage(self) -> float:
        """Fraction of all ranks' pages that running requests use."""
        return 1 - sum(cache.num_available_pages for cache in self.caches) / self.num_pages

    @property
    def cached_usage(self) -> float:
        """Fraction of all ranks' pages that hold cached prefixes without a user."""
        return sum(cache.num_unused_pages for cache in self.caches) / self.num_pages

    @property
    def num_running_tokens(self) -> int:
        """Tokens that running requests have computed, with the steps in flight."""
        return int(self.table.num_computed[self._running].sum())

    def add(self, request: Request) -> None:
        """Let a request wait. Its max_total_tokens must fit the context, and the context the pool."""
        self.requests[request.key] = self.waiting[request.key] = request

    def flush(self) -> int:
        """Evict every prefix that no running request holds, on all ranks; return how many pages became free."""
        return sum(cache.flush() for cache in self.caches)

    def preempt_all(self) -> None:
        """Let every running request wait again."""
        while len(self._running):
            self._preempt(self._running)

    def abort(self, key: int) -> bool:
        """End a request and release its pages; return False if there is none. Its tokens in flight are dropped."""
        request = self.requests.pop(key, None)
        if request is None:
            return False
        if request.row >= 0:
            self._leave_row(request.row)
        else:
            del self.waiting[key]
            self.adapters.withdraw(request)
        return True

    def schedule(self) -> StepPlan | None:
        """Plan the next step and count it as computed; return None if no request can run.

        Changes tables and caches: the plan must be run, and before any later plan.
        """
        blocked, self._blocked = self._blocked, None
        if self.config.policy != "priority" or (blocked is not None and blocked.key not in self.waiting):
            blocked = None
        victim = self._make_way(blocked) if blocked is not None and self._is_full else None
        preemptions = self.counters.preemptions
        picks = self._pick_running(blocked)
        if self.counters.preemptions == preemptions:  # else a victim could return while its token is in flight
            self._admit(picks, victim)
        rows, num_new = np.concatenate(picks.rows), np.concatenate(picks.num_new)
        if not len(rows):
            return None
        if len(rows) > picks.num_decoding:  # decoding rows alone are in order
            kind = np.where(self.table.has_sampled[rows], 0, np.where(num_new <= picks.width, 1, 2))
            order = np.lexsort((kind, self.table.rank[rows]))
            rows, num_new = rows[order], num_new[order]
        plan = self._build(rows, num_new, picks)
        self._pages.share(rows[~plan.from_device])
        self.counters.steps += 1
        return plan

    def _make_way(self, blocked: Request) -> Request | None:
        """Preempt a running request, if one is less urgent than a request for which there is no room, and return it."""
        rows = self._running
        if not (self._urgency(rows) < blocked.urgency).any():
            return None
        arrivals = [r.arrival if r else 0 for r in map(self.table.requests.__getitem__, rows)]
        return self._preempt(rows[np.argsort(arrivals)])

    def _preempt(self, rows: np.ndarray) -> Request:
        """Let the last of the least urgent of these requests wait again, and return it. Its tokens in flight are dropped and
        sampled anew, which gives the same ones."""
        urgency = self._urgency(rows)
        victim = self._leave_row(int(rows[urgency == urgency.min()][-1]))
        self.waiting[victim.key] = victim
        self.counters.preemptions += 1
        return victim

    def _urgency(self, rows: np.ndarray) -> np.ndarray:
        return np.array([r.urgency if r else 0 for r in map(self.table.requests.__getitem__, rows)])

    def _chunks(self, rows: np.ndarray, budget: list[int], blocked: Request | None) -> tuple[np.ndarray, np.ndarray]:
        """Divide the budget among prompts, in order of admission or else of urgency; less urgent ones leave a blocked request
        what it may need. Return the rows that get any, and their numbers of new tokens."""
        urgency = self._urgency(rows) if self.config.policy == "priority" else np.zeros(len(rows))
        rows, urgency = rows[(order := np.argsort(-urgency, kind="stable"))], urgency[order]
        num_before = len(rows) if blocked is None else int((urgency >= blocked.urgency).sum())
        chunks = self.table.chunks(rows[:num_before], budget)
        if blocked is not None:
            kept = [min(len(blocked.tokens), each) for each in budget]
            left = [each - reserved for each, reserved in zip(budget, kept, strict=True)]
            chunks = np.concatenate([chunks, self.table.chunks(rows[num_before:], left)])
            budget[:] = [each + reserved for each, reserved in zip(left, kept, strict=True)]
        return rows[chunks > 0], chunks[chunks > 0]

    def _pick_running(self, blocked: Request | None) -> Picks:
        """Choose the running rows of this step and allocate their new pages. A rank that lacks pages preempts a request."""
        t, limits = self.table, self.config
        while True:
            run = self._running
            decodes = t.has_sampled[run]
            decode_rows = run[decodes & (t.num_sure[run] < t.max_total[run])]
            decode_rows = self.grammars.ready(decode_rows, decodes)
            per_rank = self._pages.count_by_rank(decode_rows)
            may_come = 0 if self._is_full else len(self.waiting)
            most_rows = self._admission.most_rows(run, may_come)
            width = self._widths(most_rows) if limits.width > 1 else 1
            rows, num_new = decode_rows, np.full(len(decode_rows), width, np.int32)
            budget = [min(limits.max_step_tokens - n * width, limits.max_prefill_tokens) for n in per_rank]
            if len(prefill_rows := run[~decodes]):
                prefill_rows, chunks = self._chunks(prefill_rows, budget, blocked)
                rows, num_new = np.concatenate([rows, prefill_rows]), np.concatenate([num_new, chunks])
                by_rank = np.argsort(t.rank[rows], kind="stable")
                rows, num_new = rows[by_rank], num_new[by_rank]
            need = self._pages.needed(rows, num_new)
            short = self._pages.short_rank(rows, need)
            if short is None:
                given = [self._pages.give(rows, need)]
                return Picks(width, most_rows, len(decode_rows), budget, [rows], [num_new], given)
            self._preempt(run[t.rank[run] == short])

    def _admit(self, picks: Picks, victim: Request | None) -> None:
        """Seat waiting requests, but for one that just made way, until no rank has budget, a row and pages for the next one."""
        self._is_full = False
        if not self.waiting or not (self.table.num_free or self.config.policy == "priority"):
            return
        being_computed = self._admission.prefixes_being_computed(self._running)
        for request in POLICIES[self.config.policy](self.waiting.values(), self.caches):
            if request is victim or not (self.grammars.admits(request) and self.adapters.admits(request)):
                continue
            place = self._admission.place(request, picks.budget, self._running, being_computed)
            if place is None:
                self._is_full, self._blocked = min(picks.budget) > 0, request
                return
            num_rows = self._pages.count_by_rank(self._running)[place.rank] + 1
            if picks.width > 1 and num_rows > picks.most_rows and self._widths(num_rows) == 1:
                return  # with one more row this step would be narrow; the next step counts the request
            if place.next_page in being_computed:
                continue  # a row of the rank is computing the same page, which the next step will find cached
            self._seat(request, place, picks)
            being_computed.add(place.next_page)

    def _seat(self, request: Request, place: Place, picks: Picks) -> None:
        """Give a waiting request its row and pages, and add it to the step."""
        t, rank, handle = self.table, place.rank, place.handle
        del self.waiting[request.key]
        row = t.seat(request, rank)
        self._pages.seat(row, handle)
        t.params[row, Param.ADAPTER], load = self.adapters.seat(request)
        picks.adapter_loads += [load] if load else []
        self.grammars.seat(request)
        last_of_rank = np.searchsorted(t.rank[self._running], rank, side="right")
        self._running = np.insert(self._running, last_of_rank, row)
        if not request.admitted:
            request.admit(handle.num_tokens)
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += handle.num_tokens
        picks.num_cached_tokens += handle.num_tokens
        needs_state = bool(t.params[row, Param.FLAGS] & (RowFlag.PENALTIES | RowFlag.BIAS)) or self.config.keeps_tokens
        if handle.num_pages or needs_state:
            pages = handle.pages if handle.num_pages else None
            picks.loads.append(RowLoad(row, pages, request if needs_state else None))
        num_new = min(len(request.tokens) - handle.num_tokens, picks.budget[rank])
        picks.budget[rank] -= num_new
        rows, new = np.array([row], np.int32), np.array([num_new], np.int32)
        picks.rows.append(rows)
        picks.num_new.append(new)
        picks.page_updates.append(self._pages.give(rows, self._pages.needed(rows, new)))

    def _build(self, rows: np.ndarray, num_new: np.ndarray, picks: Picks) -> StepPlan:
        """Make the plan and advance the rows past it."""
        t = self.table
        start, from_device = t.num_computed[rows], t.has_sampled[rows]
        end = start + num_new
        samples = from_device | (end == t.num_tokens[rows])
        of_prompts = {}  # columns that matter only where a row computes tokens which the host knows
        if len(rows) > picks.num_decoding:
            following = t.tokens[rows, np.minimum(end, t.tokens.shape[1] - 1)]
            of_prompts["next_token"] = np.where(end < t.prompt_len[rows], following, np.int32(-1))
            of_prompts["tokens"] = t.next_tokens(rows, num_new)
        plan = StepPlan.of(
            num_new,
            num_ranks=len(self.caches),
            width=picks.width,
            most_rows=picks.most_rows,
            keys=t.key[rows],
            rank=t.rank[rows],
            loads=[*picks.loads, *self._pages.take_reloads(), *self.grammars.take_loads()],
            adapter_loads=picks.adapter_loads,
            num_cached_tokens=picks.num_cached_tokens,
            rows=rows,
            start=start,
            samples=samples,
            from_device=from_device,
            params=t.params[rows],
            page_updates=np.concatenate(picks.page_updates, axis=1),
            **of_prompts,
        )
        t.num_computed[rows] = end
        sampled = rows[samples]
        t.num_tokens[sampled] = end[samples] + 1
        t.num_sure[sampled] += 1
        t.has_sampled[sampled] = True
        if plan.wants_prompt_logprobs:  # the prompt is computed: later steps do not score it
            t.params[sampled, Param.FLAGS] &= ~int(RowFlag.PROMPT_LOGPROBS)
        return plan

    def _leave_row(self, row: int) -> Request:
        """Release a row with its pages; the tree keeps the computed ones that it can. Return the row's request."""
        self._pages.release(row)
        self._running = self._running[self._running != row]
        self.grammars.leave(row)
        request = self.table.unseat(row)
        self.adapters.leave(request)
        return request

    def process(self, plan: StepPlan, step: StepTokens, seconds: float | None = None) -> StepResult:
        """Take in a step's tokens, up to the one at which a request ends. Rows that changed hands are skipped. `seconds`: what
        the step took, if it is known and nothing else used the processor."""
        t = self.table
        alive = t.key[plan.rows] == plan.keys
        scored = scored_requests(t, plan, alive)
        index = np.flatnonzero(plan.samples & alive)
        rows = plan.rows[index]
        first = started_requests(t, rows)
        drafts = verified_drafts(plan, step, index)
        if len(drafts):
            self.counters.count_drafts(drafts)
        taken = take_tokens(t, plan, step, index)
        if self.config.width > 1:
            decoded = plan.from_device & alive
            num_rows, num_gained = int(decoded.sum()), int(step.num_accepted[decoded].sum())
            alone = seconds if plan.from_device.all() else None
            self._widths.observe(plan.width, plan.most_rows, num_rows, num_gained, alone)
        self.counters.generated_tokens += len(taken.tokens)
        return StepResult(
            keys=plan.keys[index][taken.of],
            tokens=taken.tokens,
            lines=index[taken.of] * plan.width + taken.line,
            first=first,
            finished=[(self.requests.pop(self._leave_row(int(rows[i])).key), reason) for i, reason in taken.ends],
            scored=scored,
            drafts=drafts,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError unless every page and row has exactly one owner and every counter is in order."""
        table, run, width = self.table, self._running, self.config.width
        assert len(run) + table.num_free == len(self.caches) * self.config.max_running_requests
        assert max(self._pages.count_by_rank(run)) <= self.config.max_running_requests
        assert (np.diff(table.rank[run]) >= 0).all()
        assert len(self.waiting) + len(run) == len(self.requests)
        table.check_invariants(run, width)
        self._pages.check_invariants(run, 2 * (width - 1))
        for part in (self.adapters, self.grammars):
            part.check_invariants(request for request in map(table.requests.__getitem__, run) if request)
