"""Priorities in the scheduler: the order of admission, and who makes way for whom."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.step_plan import StepPlan
from simulated import Client, make_core, make_request, make_scheduler, step_tokens


def run(scheduler: Scheduler) -> StepPlan:
    """Run a step in which every row that samples gets token 9."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.process(plan, step_tokens(plan, np.where(plan.samples, 9, 0)))
    scheduler.check_invariants()
    return plan


def test_the_most_urgent_is_admitted_first_then_the_first_to_come() -> None:
    s = make_scheduler(rows=4, step_tokens=64, policy="priority")
    for key, urgency in ((1, 0), (2, 3), (3, -1), (4, 3)):
        s.add(make_request(key, [key, key], urgency=urgency))
    assert run(s).keys.tolist() == [2, 4, 1, 3]


def test_the_youngest_of_the_least_urgent_makes_way_where_no_row_is_free() -> None:
    s = make_scheduler(rows=3, step_tokens=64, policy="priority")
    for key, urgency in ((1, 0), (2, 1), (3, 0)):
        s.add(make_request(key, [key, key], urgency=urgency))
    run(s)
    s.add(make_request(4, [4, 4], urgency=1))
    run(s)  # finds that it is blocked
    assert sorted(run(s).keys.tolist()) == [1, 2, 4]
    assert (s.counters.preemptions, [*s.waiting]) == (1, [3])


def test_a_request_of_the_same_priority_waits() -> None:
    s = make_scheduler(rows=1, step_tokens=64, policy="priority")
    s.add(make_request(1, [1, 1], urgency=2, max_tokens=5))
    run(s)
    s.add(make_request(2, [2, 2], urgency=2))
    for _ in range(4):
        assert run(s).keys.tolist() == [1]
    assert run(s).keys.tolist() == [2]
    assert s.counters.preemptions == 0


def test_as_many_make_way_as_have_the_pages_that_are_missing() -> None:
    s = make_scheduler(rows=8, num_usable_pages=16, page_size=4, step_tokens=64, policy="priority", radix=False)
    for key in (1, 2, 3):
        s.add(make_request(key, [key] * 14, max_tokens=30))
    run(s)
    s.add(make_request(4, [4] * 40, urgency=1, max_tokens=20))
    for _ in range(8):
        plan = run(s)
    assert plan.keys.tolist() == [4]
    assert sorted(s.waiting) == [1, 2, 3]


def test_a_long_prompt_leaves_a_more_urgent_request_its_budget_and_goes_on() -> None:
    s = make_scheduler(rows=4, num_usable_pages=40, page_size=4, step_tokens=8, policy="priority", radix=False)
    s.add(make_request(1, list(range(60)), max_tokens=2))
    run(s)
    s.add(make_request(2, [70, 71], urgency=1, max_tokens=2))
    assert run(s).keys.tolist() == [1]  # finds that the budget is spent
    plan = run(s)
    assert dict(zip(plan.keys.tolist(), plan.num_new.tolist(), strict=True)) == {1: 6, 2: 2}
    assert s.counters.preemptions == 0


def test_a_prompt_does_not_starve_beside_short_urgent_ones() -> None:
    s = make_scheduler(rows=4, num_usable_pages=40, page_size=4, step_tokens=8, policy="priority", radix=False)
    s.add(make_request(1, list(range(40)), max_tokens=1))
    for key in range(2, 14):
        s.add(make_request(key, [70, key], urgency=1, max_tokens=2))
        run(s)
    assert 1 not in s.requests
    assert s.counters.preemptions == 0


def test_the_budget_goes_to_the_most_urgent_prompt_first() -> None:
    s = make_scheduler(rows=4, num_usable_pages=60, page_size=4, step_tokens=8, policy="priority", radix=False)
    s.add(make_request(1, list(range(30)), max_tokens=2))
    run(s)
    s.add(make_request(2, list(range(40, 60)), urgency=1, max_tokens=2))
    run(s)
    for _ in range(2):
        assert run(s).keys.tolist() == [2]


def test_the_least_urgent_is_preempted_where_pages_run_out() -> None:
    s = make_scheduler(rows=3, num_usable_pages=8, page_size=4, step_tokens=64, policy="priority", radix=False)
    s.add(make_request(1, [1] * 7, max_tokens=20))
    s.add(make_request(2, [2] * 7, max_tokens=20, urgency=1))
    while not s.counters.preemptions:
        run(s)
    assert [*s.waiting] == [1]


@pytest.mark.parametrize("overlap", [True, False])
def test_urgent_requests_overtake_and_no_token_changes(overlap: bool) -> None:
    def answers(policy: str) -> tuple[dict[int, list[int]], list[int]]:
        client = Client(make_core(policy=policy, rows=2, step_tokens=16, overlap=overlap))
        begun: list[int] = []
        for key in range(1, 9):
            client.submit(key, [key, key + 1], max_tokens=6, seed=key, priority=key % 3 if policy == "priority" else 0)
        while client.core.busy:
            client.step()
            begun += [key for key, answer in client.answers.items() if answer.tokens and key not in begun]
        return client.tokens, begun

    plain, _ = answers("fcfs")
    tokens, begun = answers("priority")
    assert tokens == plain
    assert begun == [2, 5, 1, 8, 4, 7, 3, 6]  # within a step by key
