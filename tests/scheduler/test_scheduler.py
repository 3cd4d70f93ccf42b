"""Tests of the scheduler: small scenarios with plans computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.request import FinishReason
from sgl_jax.scheduler.results import StepResult
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.step_plan import Param, RowFlag, StepPlan
from simulated import make_request, make_scheduler, step_tokens


def lines(plan: StepPlan | None) -> list[tuple]:
    """Return a plan's rows as (key, start, num_new, samples, from_device)."""
    assert plan is not None
    columns = (plan.keys, plan.start, plan.num_new, plan.samples, plan.from_device)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def updates(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return a plan's page updates as (key, index in its page table, page id)."""
    key_of = dict(zip(plan.rows.tolist(), plan.keys.tolist(), strict=True))
    return [(key_of[row], index, page) for row, index, page in plan.page_updates.T.tolist()]


def loaded(plan: StepPlan) -> dict[int, list[int]]:
    """Return the page tables that are loaded before the step, by key."""
    key_of = dict(zip(plan.rows.tolist(), plan.keys.tolist(), strict=True))
    return {key_of[load.row]: load.pages.tolist() for load in plan.loads if load.pages is not None}


def step(scheduler: Scheduler, *sampled: int) -> tuple[StepPlan, StepResult]:
    """Run a step. `sampled`: the tokens of the rows that sample, in plan order."""
    plan = scheduler.schedule()
    assert plan is not None
    tokens = np.zeros(len(plan.rows), np.int32)
    tokens[plan.samples] = sampled
    result = scheduler.process(plan, step_tokens(plan, tokens))
    scheduler.check_invariants()
    return plan, result


def finish_all(scheduler: Scheduler) -> None:
    """Check that no request is left and every page is back."""
    assert not scheduler.has_requests
    scheduler.check_invariants()
    assert scheduler.caches[0].num_available_pages == scheduler.caches[0].num_usable_pages


def test_a_long_prompt_is_cut_into_chunks_and_then_decodes() -> None:
    s = make_scheduler(page_size=4, step_tokens=8)
    prompt = list(range(100, 119))
    s.add(make_request(7, prompt, max_tokens=3))

    plan, result = step(s)
    assert lines(plan) == [(7, 0, 8, False, False)]
    assert plan.tokens.tolist() == prompt[:8]
    assert plan.next_token.tolist() == [108]
    assert updates(plan) == [(7, 0, 1), (7, 1, 2)]
    assert result.keys.tolist() == []

    plan, _ = step(s)
    assert lines(plan) == [(7, 8, 8, False, False)]
    assert plan.tokens.tolist() == prompt[8:16]
    assert plan.next_token.tolist() == [116]
    assert updates(plan) == [(7, 2, 3), (7, 3, 4)]

    plan, result = step(s, 50)
    assert lines(plan) == [(7, 16, 3, True, False)]
    assert plan.tokens.tolist() == prompt[16:]
    assert plan.next_token.tolist() == [-1]
    assert updates(plan) == [(7, 4, 5)]
    assert (result.keys.tolist(), result.tokens.tolist()) == ([7], [50])
    assert [r.key for r in result.first] == [7]

    plan, result = step(s, 51)
    assert lines(plan) == [(7, 19, 1, True, True)]
    assert updates(plan) == []
    assert result.first == []

    plan, result = step(s, 52)
    assert lines(plan) == [(7, 20, 1, True, True)]
    assert updates(plan) == [(7, 5, 6)]
    assert [(r.key, reason) for r, reason in result.finished] == [(7, FinishReason("length"))]
    assert result.finished[0][0].tokens.tolist() == [*prompt, 50, 51, 52]
    finish_all(s)


def test_decodes_and_prompts_share_a_step_and_decodes_come_first() -> None:
    s = make_scheduler(step_tokens=8)
    s.add(make_request(1, [1, 2, 3]))
    step(s, 10)
    s.add(make_request(2, list(range(20, 30))))
    s.add(make_request(3, [30, 31]))
    plan, _ = step(s, 11)
    assert lines(plan) == [(1, 3, 1, True, True), (2, 0, 7, False, False)]
    assert plan.num_short == 1
    assert plan.tokens.tolist()[1:] == list(range(20, 27))
    plan, _ = step(s, 12, 90, 91)
    assert lines(plan) == [(1, 4, 1, True, True), (2, 7, 3, True, False), (3, 0, 2, True, False)]
    assert plan.tokens.tolist()[1:] == [27, 28, 29, 30, 31]
    plan, _ = step(s, 13, 92, 93)
    assert lines(plan) == [(1, 5, 1, True, True), (2, 10, 1, True, True), (3, 2, 1, True, True)]


def test_a_prompt_of_one_token_is_packed_with_the_decodes() -> None:
    s = make_scheduler()
    s.add(make_request(1, [1, 2, 3]))
    s.add(make_request(2, [9]))
    plan, _ = step(s, 20, 10)
    assert lines(plan) == [(2, 0, 1, True, False), (1, 0, 3, True, False)]
    assert plan.num_short == 1
    assert plan.tokens.tolist() == [9, 1, 2, 3]


def test_a_later_request_starts_behind_the_pages_of_its_prefix() -> None:
    s = make_scheduler(page_size=4)
    s.add(make_request(1, list(range(12)), max_tokens=1))
    step(s, 50)
    s.add(make_request(2, [*range(8), 99, 98]))
    plan, result = step(s, 51)
    assert lines(plan) == [(2, 8, 2, True, False)]
    assert plan.tokens.tolist() == [99, 98]
    assert loaded(plan) == {2: [1, 2]}
    assert updates(plan) == [(2, 2, 4)]
    assert result.first[0].num_cached_tokens == 8
    assert s.counters.cached_tokens == 8
    assert s.counters.prompt_tokens == 22


def test_output_is_cached_as_prompts_are() -> None:
    s = make_scheduler(page_size=4)
    s.add(make_request(1, [1, 2, 3], max_tokens=6))
    for token in (4, 5, 6, 7, 8, 9):
        step(s, token)
    s.add(make_request(2, list(range(1, 13))))
    plan, _ = step(s, 50)
    assert lines(plan) == [(2, 8, 4, True, False)]  # the KV of the 9, sampled last, was never computed


def test_a_fully_cached_prompt_leaves_one_token_to_compute() -> None:
    s = make_scheduler(page_size=4)
    for key in (1, 2):
        s.add(make_request(key, list(range(8)), max_tokens=1))
        plan, _ = step(s, 50)
    assert lines(plan) == [(2, 4, 4, True, False)]
    s = make_scheduler(page_size=1)
    for key in (1, 2):
        s.add(make_request(key, list(range(8)), max_tokens=1))
        plan, _ = step(s, 50)
    assert lines(plan) == [(2, 7, 1, True, False)]


def test_namespaces_share_nothing() -> None:
    s = make_scheduler(page_size=4)
    s.add(make_request(1, list(range(12)), max_tokens=1, namespace="a"))
    step(s, 50)
    s.add(make_request(2, list(range(12)), max_tokens=1, namespace="b"))
    plan, _ = step(s, 50)
    assert lines(plan) == [(2, 0, 12, True, False)]


def test_without_radix_nothing_is_shared_and_nothing_stays() -> None:
    s = make_scheduler(page_size=4, radix=False)
    s.add(make_request(1, list(range(12)), max_tokens=1))
    s.add(make_request(2, list(range(12)), max_tokens=1))
    plan, _ = step(s, 50)
    assert lines(plan) == [(1, 0, 12, True, False), (2, 0, 4, False, False)]
    plan, _ = step(s, 50)
    assert lines(plan) == [(2, 4, 8, True, False)]
    assert s.caches[0].pool.num_free == s.caches[0].num_usable_pages


def test_a_sibling_waits_one_step_for_the_prefix_another_row_computes() -> None:
    s = make_scheduler(page_size=4)
    s.add(make_request(1, [*range(12), 50]))
    s.add(make_request(2, [*range(12), 60]))
    s.add(make_request(3, [90, 91]))
    plan, _ = step(s, 5, 5)
    assert lines(plan) == [(1, 0, 13, True, False), (3, 0, 2, True, False)]
    plan, _ = step(s, 6, 6, 6)
    assert lines(plan) == [(1, 13, 1, True, True), (3, 2, 1, True, True), (2, 12, 1, True, False)]
    assert loaded(plan) == {2: [1, 2, 3]}


def test_a_sibling_of_a_chunked_prompt_starts_as_soon_as_their_ways_part() -> None:
    s = make_scheduler(page_size=4, step_tokens=8)
    s.add(make_request(1, list(range(24))))
    s.add(make_request(2, [*range(8), 70, 71, 72, 73, 74]))
    assert lines(step(s)[0]) == [(1, 0, 8, False, False)]
    assert lines(step(s)[0]) == [(1, 8, 8, False, False)]
    assert lines(step(s, 5)[0]) == [(1, 16, 8, True, False)]
    assert lines(step(s, 6, 7)[0]) == [(1, 24, 1, True, True), (2, 8, 5, True, False)]


def test_a_page_computed_twice_in_one_step_is_kept_once_and_the_table_reloaded() -> None:
    s = make_scheduler(page_size=4)
    s.add(
        make_request(1, [0, 1, 2, 3])
    )  # it does not wait for its last page, since its last token is computed in any case
    s.add(make_request(2, [0, 1, 2, 3, 4, 5]))
    plan, _ = step(s, 50, 51)
    assert lines(plan) == [(1, 0, 4, True, False), (2, 0, 6, True, False)]
    assert updates(plan) == [(1, 0, 1), (2, 0, 2), (2, 1, 3)]
    plan, _ = step(s, 52, 53)
    assert lines(plan) == [(1, 4, 1, True, True), (2, 6, 1, True, True)]
    assert loaded(plan) == {2: [1, 3]}
    assert updates(plan) == [(1, 1, 2)]  # the spare copy went back to the pool at once
    assert step(s, 54, 55)[0].loads == []


def test_the_youngest_is_preempted_and_resumes_behind_its_cached_pages() -> None:
    s = make_scheduler(num_usable_pages=5, page_size=2, step_tokens=8, context_length=10)
    s.add(make_request(1, [1, 2], max_tokens=7))
    s.add(make_request(2, [3, 4], max_tokens=5))
    assert lines(step(s, 10, 20)[0]) == [(1, 0, 2, True, False), (2, 0, 2, True, False)]
    step(s, 11, 21)  # tokens 3: pages 1 3 and 2 4
    assert s.caches[0].num_available_pages == 1
    step(s, 12, 22)
    plan, result = step(s, 13)  # both want a page, one is left
    assert lines(plan) == [(1, 4, 1, True, True)]
    assert updates(plan) == [(1, 2, 5)]
    assert s.counters.preemptions == 1
    waiting = s.waiting[2]
    assert waiting.row == -1
    assert waiting.tokens.tolist() == [3, 4, 20, 21, 22]
    assert waiting.announced
    assert s.caches[0].num_available_pages == 2  # its two whole pages stay in the tree, unlocked

    plan, _ = step(s, 14)
    assert lines(plan) == [(1, 5, 1, True, True)]
    assert s.waiting  # it needs one page more than there is
    plan, _ = step(s, 15)
    assert lines(plan) == [(1, 6, 1, True, True)]
    assert updates(plan) == [(1, 3, 4)]  # the later half of the preempted request's cached prefix, evicted
    plan, result = step(s, 16)
    assert [(r.key, r.tokens.tolist()) for r, _ in result.finished] == [(1, [1, 2, 10, 11, 12, 13, 14, 15, 16])]

    plan, result = step(s, 23)
    assert lines(plan) == [(2, 2, 3, True, False)]
    assert plan.tokens.tolist() == [20, 21, 22]
    assert result.first == []  # announced before
    plan, result = step(s, 24)
    assert [(r.key, r.tokens.tolist()) for r, _ in result.finished] == [(2, [3, 4, 20, 21, 22, 23, 24])]
    assert s.counters.generated_tokens == 12
    assert s.counters.prompt_tokens == 4
    finish_all(s)


def test_a_token_in_flight_of_a_preempted_request_is_dropped_and_sampled_again() -> None:
    s = make_scheduler(num_usable_pages=5, page_size=2, step_tokens=8, context_length=10)
    s.add(make_request(1, [1, 2], max_tokens=7))
    s.add(make_request(2, [3, 4], max_tokens=5))
    step(s, 10, 20)
    step(s, 11, 21)
    in_flight = s.schedule()
    assert lines(in_flight) == [(1, 3, 1, True, True), (2, 3, 1, True, True)]
    plan = s.schedule()  # request 2 loses its row while its third token is in flight
    assert lines(plan) == [(1, 4, 1, True, True)]
    assert s.waiting[2].tokens.tolist() == [3, 4, 20, 21]
    assert in_flight is not None
    result = s.process(in_flight, step_tokens(in_flight, np.array([12, 22])))
    assert (result.keys.tolist(), result.tokens.tolist(), result.lines.tolist()) == ([1], [12], [0])
    assert s.waiting[2].tokens.tolist() == [3, 4, 20, 21]
    s.check_invariants()


def test_a_step_planned_ahead_takes_its_tokens_from_the_device() -> None:
    s = make_scheduler(page_size=2)
    s.add(make_request(1, [1, 2, 3], stop=(77,)))
    first, second = s.schedule(), s.schedule()
    assert lines(first) == [(1, 0, 3, True, False)]
    assert lines(second) == [(1, 3, 1, True, True)]
    assert first is not None
    assert second is not None
    s.process(first, step_tokens(first, np.array([50])))
    third = s.schedule()
    assert lines(third) == [(1, 4, 1, True, True)]
    result = s.process(second, step_tokens(second, np.array([77])))  # a stop token: the third step is wasted
    assert [(r.key, reason) for r, reason in result.finished] == [(1, FinishReason("stop", 77))]
    assert third is not None
    assert s.process(third, step_tokens(third, np.array([60]))).keys.tolist() == []
    finish_all(s)


def test_no_step_is_planned_past_the_last_token() -> None:
    s = make_scheduler()
    s.add(make_request(1, [1, 2, 3], max_tokens=2))
    first, second = s.schedule(), s.schedule()
    assert s.schedule() is None
    assert first is not None
    assert second is not None
    assert s.process(first, step_tokens(first, np.array([5]))).finished == []
    assert [r.key for r, _ in s.process(second, step_tokens(second, np.array([6]))).finished] == [1]
    assert s.counters.steps == 2
    finish_all(s)


def test_a_result_for_a_row_that_changed_hands_is_dropped() -> None:
    s = make_scheduler(rows=1)
    s.add(make_request(1, [1, 2]))
    s.add(make_request(2, [3, 4]))
    first = s.schedule()
    assert s.abort(1)
    second = s.schedule()
    assert lines(second) == [(2, 0, 2, True, False)]
    assert first is not None
    assert second is not None
    assert first.rows.tolist() == second.rows.tolist()
    assert s.process(first, step_tokens(first, np.array([9]))).keys.tolist() == []
    assert s.process(second, step_tokens(second, np.array([8]))).keys.tolist() == [2]
    assert not s.abort(1)
    assert s.abort(2)
    finish_all(s)


def test_fcfs_admits_by_arrival_and_a_preempted_request_keeps_its_place() -> None:
    s = make_scheduler(rows=1, policy="fcfs")
    late, early = make_request(5, [5]), make_request(3, [3])
    s.add(late)
    s.add(early)
    assert lines(step(s, 9)[0]) == [(3, 0, 1, True, False)]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [2, 3, 4]), ("lpm", [4, 3, 2])])
def test_lpm_admits_the_longest_cached_prefix_first(policy: str, order: list[int]) -> None:
    s = make_scheduler(rows=4, page_size=4, step_tokens=64, policy=policy)
    s.add(make_request(1, list(range(12)), max_tokens=1))
    step(s, 50)
    s.add(make_request(2, [90, 91, 92]))
    s.add(make_request(3, [0, 1, 2, 3, 80, 81]))
    s.add(make_request(4, [0, 1, 2, 3, 4, 5, 6, 7, 70, 71]))
    plan, _ = step(s, 51, 52, 53)
    assert plan.keys.tolist() == order
    assert loaded(plan) == {3: [1], 4: [1, 2]}


def test_equal_prefixes_are_admitted_by_arrival_under_lpm() -> None:
    s = make_scheduler(rows=2, policy="lpm")
    for key in (4, 2, 3):
        s.add(make_request(key, [key, key]))
    assert step(s, 50, 51)[0].keys.tolist() == [2, 3]


def test_lpm_serves_a_request_without_a_cached_prefix_after_a_bounded_number_of_later_ones() -> None:
    s = make_scheduler(rows=1, page_size=4, step_tokens=64, policy="lpm")
    shared = list(range(8))
    s.add(make_request(0, shared, max_tokens=1))
    step(s, 50)
    s.add(make_request(1, [90, 91, 92], max_tokens=1))
    s.add(make_request(2, [*shared, 2], max_tokens=1))
    served = []
    for key in range(3, 300):  # there is always one that waits with the prefix
        s.add(make_request(key, [*shared, key], max_tokens=1))
        served += step(s, 50)[0].keys.tolist()
    assert served[:257] == [*range(2, 257), 1, 257]


def test_prompts_share_their_own_budget_and_what_decodes_leave() -> None:
    s = make_scheduler(rows=4, step_tokens=10, prefill_tokens=6)
    s.add(make_request(1, [1, 2, 3, 4]))
    s.add(make_request(2, list(range(20, 29))))
    assert lines(step(s, 50)[0]) == [(1, 0, 4, True, False), (2, 0, 2, False, False)]
    assert lines(step(s, 51)[0]) == [(1, 4, 1, True, True), (2, 2, 6, False, False)]
    s.add(make_request(3, list(range(30, 39))))
    # The last token of a prompt counts against the budget of prompt tokens.
    assert lines(step(s, 52, 60)[0]) == [(1, 5, 1, True, True), (2, 8, 1, True, False), (3, 0, 5, False, False)]


def test_the_step_budget_holds_decodes_and_prompts_together() -> None:
    s = make_scheduler(rows=3, step_tokens=4)
    s.add(make_request(1, [1]))
    s.add(make_request(2, [2]))
    step(s, 50, 60)
    s.add(make_request(3, [3, 4, 5]))
    assert lines(step(s, 51, 61)[0]) == [(1, 1, 1, True, True), (2, 1, 1, True, True), (3, 0, 2, False, False)]


def test_no_more_requests_run_than_there_are_rows() -> None:
    s = make_scheduler(rows=2)
    for key in (1, 2, 3):
        s.add(make_request(key, [key], max_tokens=2))
    assert step(s, 50, 60)[0].keys.tolist() == [1, 2]
    assert step(s, 51, 61)[0].keys.tolist() == [1, 2]
    assert step(s, 70)[0].keys.tolist() == [3]


def test_a_request_waits_until_all_its_tokens_so_far_and_a_page_for_each_running_row_fit() -> None:
    s = make_scheduler(num_usable_pages=4, page_size=2, context_length=8)
    s.add(make_request(1, [1, 2], max_tokens=2))
    s.add(make_request(2, [3, 4, 5], max_tokens=2))  # two pages for 3 + 1 tokens, one for request 1 to grow: 3 of 3
    assert lines(step(s, 50, 60)[0]) == [(1, 0, 2, True, False), (2, 0, 3, True, False)]
    s = make_scheduler(num_usable_pages=4, page_size=2, context_length=8)
    s.add(make_request(1, [1, 2], max_tokens=2))
    s.add(make_request(2, [3, 4, 5, 6], max_tokens=2))  # three pages for 4 + 1 tokens
    assert lines(step(s, 50)[0]) == [(1, 0, 2, True, False)]
    step(s, 51)
    assert lines(step(s, 60)[0]) == [(2, 0, 4, True, False)]


def test_a_prompt_to_be_scored_is_computed_whole_but_left_to_others() -> None:
    s = make_scheduler(page_size=4)
    s.add(make_request(1, list(range(12)), max_tokens=1))
    step(s, 50)
    s.add(make_request(2, list(range(12)), prompt_logprobs=0))
    plan, result = step(s, 51)
    assert lines(plan) == [(2, 0, 12, True, False)]
    assert plan.wants_prompt_logprobs
    assert result.first[0].num_cached_tokens == 0


def test_a_prompt_is_scored_while_it_is_computed_and_no_longer() -> None:
    s = make_scheduler(step_tokens=4)
    s.add(make_request(1, [1, 2, 3, 4, 5, 6], prompt_logprobs=0))
    flags = []
    first, second, third = s.schedule(), s.schedule(), s.schedule()
    for plan in (first, second, third):
        assert plan is not None
        flags.append(bool(plan.params[0, Param.FLAGS] & RowFlag.PROMPT_LOGPROBS))
        s.process(plan, step_tokens(plan, np.array([50])))
    assert flags == [True, True, False]


def test_being_preempted_inside_the_prompt_changes_neither_its_count_nor_its_cached_tokens() -> None:
    s = make_scheduler(num_usable_pages=7, page_size=2, step_tokens=4, prefill_tokens=1, context_length=14)
    s.add(make_request(1, [1], max_tokens=8))
    step(s, 10)
    s.add(make_request(2, list(range(20, 28)), max_tokens=2))
    for i in range(6):
        assert lines(step(s, 11 + i)[0]) == [(1, 1 + i, 1, True, True), (2, i, 1, False, False)]
    plan, result = step(s, 17)  # both want a page, none is left
    assert lines(plan) == [(1, 7, 1, True, True)]
    assert [r.key for r, _ in result.finished] == [1]
    assert lines(step(s)[0]) == [(2, 6, 1, False, False)]
    plan, result = step(s, 50)
    assert lines(plan) == [(2, 7, 1, True, False)]
    assert (s.counters.preemptions, s.counters.prompt_tokens, s.counters.cached_tokens) == (1, 9, 0)
    assert result.first[0].num_cached_tokens == 0


def test_uncommon_state_is_loaded_at_admission_and_again_after_a_preemption() -> None:
    s = make_scheduler(num_usable_pages=5, page_size=2, step_tokens=8, context_length=10)
    s.add(make_request(1, [1, 2], max_tokens=7))
    s.add(make_request(2, [3, 4], max_tokens=5, frequency_penalty=0.5))
    plan, _ = step(s, 10, 20)
    assert [(load.row, load.request and load.request.key, load.pages) for load in plan.loads] == [(1, 2, None)]
    for sampled in ((11, 21), (12, 22), (13,), (14,), (15,), (16,)):
        plan, _ = step(s, *sampled)
        assert plan.loads == []
    plan, _ = step(s, 23)
    (load,) = plan.loads
    assert load.request is not None
    assert (load.request.key, load.request.tokens.tolist()) == (2, [3, 4, 20, 21, 22])
    assert load.pages is not None
    assert load.pages.tolist() == [2]


def test_sampling_parameters_are_encoded_by_column() -> None:
    s = make_scheduler()
    s.add(make_request(1, [1, 2], temperature=0.5, top_p=0.25, min_p=0.125, top_k=7, logprobs=2, logit_bias={3: 1.0}))
    s.add(make_request(2, [3, 4], presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=2.0, top_k=-1))
    plan, _ = step(s, 50, 51)
    floats = plan.params.view(np.float32)[:, Param.TEMPERATURE :]
    assert floats.tolist() == [[0.5, 0.25, 0.125, 0, 0, 1], [1, 1, 0, 1.5, -0.5, 2]]
    assert plan.params[:, Param.SEED].tolist() == [1, 2]
    assert plan.params[:, Param.TOP_K].tolist() == [7, 2**31 - 1]
    assert plan.params[:, Param.FLAGS].tolist() == [RowFlag.LOGPROBS | RowFlag.BIAS, RowFlag.PENALTIES]


def test_a_step_must_hold_a_token_of_every_running_request() -> None:
    with pytest.raises(ValueError, match=r"3 tokens .*4 "):
        make_scheduler(rows=4, step_tokens=3)


def test_a_preempted_requests_tokens_outlive_its_row() -> None:
    table = make_scheduler(rows=1).table
    first, second = make_request(1, [1, 2, 3]), make_request(2, [7, 8, 9])
    assert table.seat(first) == 0
    assert table.unseat(0) is first
    assert table.seat(second) == 0
    assert first.tokens.tolist() == [1, 2, 3]
