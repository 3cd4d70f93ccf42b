"""Tests of data ranks: small scenarios with plans computed by hand, and placements end to end."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.scheduler.rank_order import PLACEMENTS
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.step_plan import StepPlan
from simulated import make_request, make_scheduler, step_tokens


def lines(plan: StepPlan | None) -> list[tuple]:
    """Return a plan's rows as (rank, key, start, num_new)."""
    assert plan is not None
    return list(zip(*(c.tolist() for c in (plan.rank, plan.keys, plan.start, plan.num_new)), strict=True))


def updates(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return a plan's page updates as (key, index in its page table, page id)."""
    key_of = dict(zip(plan.rows.tolist(), plan.keys.tolist(), strict=True))
    return [(key_of[row], index, page) for row, index, page in plan.page_updates.T.tolist()]


def step(scheduler: Scheduler, token: int = 50) -> StepPlan:
    """Run a step in which every row that samples gets this token."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.process(plan, step_tokens(plan, np.full(len(plan.rows), token)))
    scheduler.check_invariants()
    return plan


def place(scheduler: Scheduler, key: int, prompt: list[int], **params) -> int:
    """Add a request and run a step. Return the rank that took it."""
    scheduler.add(make_request(key, prompt, **params))
    plan = step(scheduler)
    return int(plan.rank[plan.keys.tolist().index(key)])


def test_rows_come_by_rank_and_each_rank_has_its_single_tokens_first() -> None:
    s = make_scheduler(ranks=2, placement="round_robin", step_tokens=8)
    s.add(make_request(1, [1, 2, 3]))
    s.add(make_request(2, [4, 5]))
    plan = step(s)
    assert lines(plan) == [(0, 2, 0, 2), (1, 1, 0, 3)]
    assert plan.tokens.tolist() == [4, 5, 1, 2, 3]
    assert plan.num_short.tolist() == [0, 0]
    s.add(make_request(3, [6, 7, 8, 9]))
    s.add(make_request(4, [10, 11]))
    s.add(make_request(5, [12]))
    plan = step(s)
    assert lines(plan) == [(0, 2, 2, 1), (0, 4, 0, 2), (1, 1, 3, 1), (1, 5, 0, 1), (1, 3, 0, 4)]
    assert plan.tokens.tolist() == [0, 10, 11, 0, 12, 6, 7, 8, 9]
    assert plan.num_short.tolist() == [1, 2]
    assert plan.num_short.dtype == plan.rank.dtype == np.int32
    assert len(set(plan.rows.tolist())) == 5


def test_each_rank_has_page_ids_of_its_own() -> None:
    s = make_scheduler(ranks=2, placement="round_robin", page_size=4, num_usable_pages=16)
    s.add(make_request(2, list(range(6)), max_tokens=12))
    s.add(make_request(3, list(range(20, 25)), max_tokens=12))
    s.add(make_request(4, [30, 31], max_tokens=12))
    assert updates(step(s)) == [(2, 0, 1), (2, 1, 2), (3, 0, 1), (3, 1, 2), (4, 0, 3)]
    assert updates(step(s)) == []
    assert updates(step(s)) == []
    assert updates(step(s)) == [(2, 2, 4), (4, 1, 5)]
    assert updates(step(s)) == [(3, 2, 3)]
    while s.has_requests:
        step(s)
    assert all(cache.num_available_pages == cache.num_usable_pages for cache in s.caches)


def test_budgets_are_of_each_rank() -> None:
    s = make_scheduler(ranks=2, placement="round_robin", rows=2, step_tokens=8, prefill_tokens=6)
    s.add(make_request(2, list(range(100, 120))))
    s.add(make_request(3, list(range(200, 220))))
    assert lines(step(s)) == [(0, 2, 0, 6), (1, 3, 0, 6)]
    assert lines(step(s)) == [(0, 2, 6, 6), (1, 3, 6, 6)]


def test_no_rank_runs_more_requests_than_its_limit() -> None:
    s = make_scheduler(ranks=2, placement="round_robin", rows=2)
    for key in (2, 4, 6, 8, 10):  # all would go to rank 0
        s.add(make_request(key, [key, key]))
    assert lines(step(s)) == [(0, 2, 0, 2), (0, 4, 0, 2), (1, 6, 0, 2), (1, 8, 0, 2)]
    assert list(s.waiting) == [10]


def test_round_robin_takes_the_ranks_in_turn() -> None:
    s = make_scheduler(ranks=4, placement="round_robin")
    assert [place(s, key, [key, key, key]) for key in range(1, 7)] == [1, 2, 3, 0, 1, 2]


def test_fewest_running_fills_the_emptiest_rank() -> None:
    s = make_scheduler(ranks=2, placement="fewest_running", page_size=4)
    assert place(s, 1, [1, 2]) == 0
    assert place(s, 2, [3, 4]) == 1
    assert place(s, 3, [5] * 9) == 0  # equal in all: the lowest
    s.abort(1)
    assert place(s, 4, [6, 7]) == 1  # one each, and rank 1 has more pages
    assert place(s, 5, [8, 9]) == 0  # one against two


def test_cache_aware_goes_where_the_longest_prefix_is() -> None:
    s = make_scheduler(ranks=3, placement="cache_aware", page_size=4, step_tokens=32)
    stem = list(range(100, 116))
    assert place(s, 1, [1, 2, 3]) == 0
    assert place(s, 2, [*stem[:8], 1]) == 1
    assert place(s, 3, [*stem[:12], 9, 9, 9], prompt_logprobs=0) == 2  # the whole prompt is scored: no prefix is used
    s.add(make_request(4, [*stem, 7]))
    plan = step(s)
    assert (2, 4, 12, 5) in lines(plan)
    assert plan.loads[0].pages.tolist() == [1, 2, 3]
    assert place(s, 5, [*stem[:8], 5]) == 1  # two pages on ranks 1 and 2; rank 1 runs fewer
    assert place(s, 6, [4, 4]) == 0
    assert place(s, 7, [*stem, 8]) == 2  # although many run there


def test_cache_aware_finds_prefixes_of_the_requests_namespace_alone() -> None:
    s = make_scheduler(ranks=2, placement="cache_aware", page_size=4)
    stem = list(range(100, 108))
    assert place(s, 1, [*stem, 1], namespace="a") == 0
    assert place(s, 2, [*stem, 2], namespace="b") == 1
    assert place(s, 3, [*stem, 3], namespace="b") == 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_request_goes_on_to_the_next_rank_when_the_preferred_has_no_pages(placement: str) -> None:
    s = make_scheduler(ranks=2, placement=placement, page_size=4, num_usable_pages=8, context_length=32, step_tokens=32)
    stem = list(range(100, 124))
    s.add(make_request(2, stem, max_tokens=4))  # 7 of rank 0's 8 pages
    assert lines(step(s)) == [(0, 2, 0, 24)]
    assert place(s, 4, [*stem[:4], 1, 2, 3, 4, 5, 6, 7, 8]) == 1


def test_a_rank_out_of_budget_leaves_the_request_to_the_next() -> None:
    s = make_scheduler(ranks=2, placement="cache_aware", page_size=4, step_tokens=16)
    stem = list(range(100, 108))
    s.add(make_request(1, [*stem, *range(40)]))
    assert lines(step(s)) == [(0, 1, 0, 16)]
    s.add(make_request(2, [*stem, 1]))
    assert lines(step(s)) == [(0, 1, 16, 16), (1, 2, 0, 9)]


def test_when_no_rank_fits_the_next_in_line_waits_and_all_behind_it() -> None:
    s = make_scheduler(ranks=2, placement="fewest_running", page_size=4, num_usable_pages=8, context_length=32)
    for key in (1, 2):
        s.add(make_request(key, [key] * 12, max_tokens=20))
    step(s)
    s.add(make_request(3, [3] * 24, max_tokens=4))
    s.add(make_request(4, [4], max_tokens=4))  # would fit
    assert [line[:2] for line in lines(step(s))] == [(0, 1), (1, 2)]
    assert list(s.waiting) == [3, 4]


def test_pages_for_growth_are_kept_for_the_rows_of_the_rank_alone() -> None:
    s = make_scheduler(
        ranks=2, placement="round_robin", page_size=4, num_usable_pages=8, context_length=32, step_tokens=32
    )
    for key in (3, 5, 7):
        s.add(make_request(key, [key, key], max_tokens=4))
    assert lines(step(s)) == [(1, 3, 0, 2), (1, 5, 0, 2), (1, 7, 0, 2)]
    assert place(s, 8, list(range(27)), max_tokens=4) == 0  # 7 of 8 pages, and no row there that may grow
    assert place(s, 9, [9] * 3, max_tokens=4) == 1


def test_a_sibling_waits_for_its_rank_before_it_looks_for_pages_and_holds_nobody_up() -> None:
    s = make_scheduler(
        ranks=2, placement="round_robin", page_size=4, num_usable_pages=8, context_length=32, step_tokens=32
    )
    stem = list(range(100, 124))
    s.add(make_request(2, stem, max_tokens=4))
    s.add(make_request(4, [*stem[:12], *range(8)], max_tokens=4))
    s.add(make_request(5, [5, 5], max_tokens=4))
    assert lines(step(s)) == [(0, 2, 0, 24), (1, 5, 0, 2)]
    assert lines(step(s)) == [(0, 2, 24, 1), (1, 5, 2, 1), (1, 4, 0, 20)]  # rank 0 has 3 of its pages, but no room


def test_siblings_wait_for_their_prefix_on_one_rank_and_start_at_once_on_another() -> None:
    s = make_scheduler(ranks=2, placement="round_robin", page_size=4, step_tokens=32)
    stem = list(range(100, 108))
    for key in (2, 3, 4, 5):
        s.add(make_request(key, [*stem, key]))
    assert lines(step(s)) == [(0, 2, 0, 9), (1, 3, 0, 9)]
    assert lines(step(s)) == [(0, 2, 9, 1), (0, 4, 8, 1), (1, 3, 9, 1), (1, 5, 8, 1)]


def test_siblings_at_once_are_spread_and_each_rank_computes_their_prefix_once() -> None:
    s = make_scheduler(ranks=2, placement="cache_aware", page_size=4, step_tokens=32)
    stem = list(range(100, 108))
    for key in range(1, 7):
        s.add(make_request(key, [*stem, key]))
    assert lines(step(s)) == [(0, 1, 0, 9), (1, 2, 0, 9)]
    plan = step(s)
    assert plan.rank.tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.num_new.tolist() == [1] * 6


def test_the_youngest_of_the_rank_that_lacks_pages_is_preempted_and_may_move() -> None:
    s = make_scheduler(
        ranks=2, placement="round_robin", page_size=2, num_usable_pages=5, context_length=10, step_tokens=8
    )
    s.add(make_request(2, [1, 2], max_tokens=7))
    s.add(make_request(4, [3, 4], max_tokens=7))
    s.add(make_request(5, [5, 6], max_tokens=4))  # the youngest of all, on rank 1
    assert lines(step(s)) == [(0, 2, 0, 2), (0, 4, 0, 2), (1, 5, 0, 2)]
    assert lines(step(s)) == [(0, 2, 2, 1), (0, 4, 2, 1), (1, 5, 2, 1)]
    step(s)
    plan = step(s)  # both rows of rank 0 need a third page; one is left
    assert lines(plan) == [(0, 2, 4, 1), (1, 5, 4, 1)]
    assert s.counters.preemptions == 1
    assert list(s.waiting) == [4]
    plan = step(s)
    assert lines(plan) == [(0, 2, 5, 1), (1, 4, 0, 5)]  # moved to rank 1, where none of it is cached
    assert plan.tokens.tolist() == [0, 3, 4, 50, 50, 50]
    while s.has_requests:
        step(s)
    assert all(cache.num_available_pages == cache.num_usable_pages for cache in s.caches)


def test_lpm_admits_by_the_longest_prefix_on_any_rank() -> None:
    s = make_scheduler(ranks=2, rows=1, placement="fewest_running", policy="lpm", page_size=4, step_tokens=32)
    stem = list(range(100, 116))
    s.add(make_request(1, [1] * 5, max_tokens=1))
    s.add(make_request(2, [*stem, 1], max_tokens=1))
    assert lines(step(s)) == [(0, 1, 0, 5), (1, 2, 0, 17)]
    for key, prompt in ((3, [9, 9]), (4, [*stem[:8], 3]), (5, [*stem, 3])):
        s.add(make_request(key, prompt, max_tokens=1))
    assert sorted(step(s).keys.tolist()) == [4, 5]


def test_usage_is_of_the_pages_of_all_ranks() -> None:
    s = make_scheduler(ranks=4, page_size=4, num_usable_pages=16, context_length=32)
    s.add(make_request(1, list(range(8)), max_tokens=1))
    step(s)
    assert (s.kv_usage, s.cached_usage) == (0, 2 / 64)
    s.add(make_request(2, [*range(4), 9, 9], max_tokens=4))
    step(s)
    assert (s.kv_usage, s.cached_usage) == (2 / 64, 1 / 64)
    assert s.flush() == 1
    assert (s.num_pages, s.kv_usage, s.cached_usage) == (64, 2 / 64, 0)


@pytest.mark.parametrize(
    "caches", [[], [PrefixCache(9, 4), PrefixCache(9, 8)], [PrefixCache(9, 4), PrefixCache(9, 4, enabled=False)]]
)
def test_the_caches_of_all_ranks_are_alike(caches: list[PrefixCache]) -> None:
    with pytest.raises(ValueError, match=r"caches .*ranks"):
        Scheduler(SchedulerConfig(4, 64, 16, 16), caches)
