"""Tests of rows of width W: small scenarios with plans and bounds computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.request import FinishReason
from sgl_jax.scheduler.results import StepResult
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.step_plan import StepPlan, pages_per_row
from simulated import make_request, make_scheduler, step_tokens

W = 4


def scheduler(**options) -> Scheduler:
    return make_scheduler(**{"page_size": 4, "step_tokens": 32, "width": lambda n: W} | options)


def plan_of(s: Scheduler) -> StepPlan:
    plan = s.schedule()
    assert plan is not None
    s.check_invariants()
    return plan


def take(
    s: Scheduler,
    plan: StepPlan,
    *rows: list[int],
    accepted: list[int] | None = None,
    drafted: list[int] | None = None,
) -> StepResult:
    """Process a step whose rows sampled these tokens. A row with fewer than W tokens is padded with the token 9."""
    tokens = np.array([[*row, *[9] * (W - len(row))] for row in rows])
    counts = [len(row) for row in rows] if accepted is None else accepted
    had = None if drafted is None else np.array(drafted, np.int32)
    result = s.process(plan, step_tokens(plan, tokens[:, : plan.width], np.array(counts, np.int32), had))
    s.check_invariants()
    return result


def started(s: Scheduler, **params) -> None:
    """Make a scheduler in which request 1, with a prompt of three tokens, has its first token."""
    s.add(make_request(1, [1, 2, 3], **params))
    take(s, plan_of(s), [50])


def test_a_row_that_decodes_has_its_last_token_and_three_drafts() -> None:
    s = scheduler()
    started(s)
    plan = plan_of(s)
    assert (plan.width, plan.num_new.tolist(), plan.from_device.tolist(), plan.samples.tolist()) == (
        4,
        [4],
        [True],
        [True],
    )
    assert (plan.start.tolist(), plan.tokens.tolist(), plan.num_short.tolist()) == ([3], [0, 0, 0, 0], [1])


def test_a_step_gives_a_row_the_tokens_it_accepted() -> None:
    s = scheduler()
    started(s)
    result = take(s, plan_of(s), [51, 52, 53])
    assert (result.keys.tolist(), result.tokens.tolist(), result.lines.tolist()) == ([1, 1, 1], [51, 52, 53], [0, 1, 2])
    assert plan_of(s).start.tolist() == [6]
    assert s.counters.generated_tokens == 4


def test_a_plan_ahead_starts_at_the_upper_bound_and_the_bound_closes_in() -> None:
    s = scheduler()
    started(s)
    first, second = plan_of(s), plan_of(s)
    assert [first.start.tolist(), second.start.tolist()] == [[3], [7]]
    take(s, first, [51])  # three drafts were rejected
    third = plan_of(s)
    assert third.start.tolist() == [8]  # 3 + 1 known, and at most 4 from the second step
    take(s, second, [52, 53, 54, 55])
    take(s, third, [56])
    assert plan_of(s).start.tolist() == [9]


def test_pages_are_given_for_the_upper_bound_and_kept_when_drafts_are_rejected() -> None:
    s = scheduler()
    started(s)
    first, second = plan_of(s), plan_of(s)  # tokens 3 .. 6, then 7 .. 10 at the most
    assert [p.page_updates[1].tolist() for p in (first, second)] == [[1], [2]]
    take(s, first, [51])
    take(s, second, [52])
    assert plan_of(s).page_updates.shape[1] == 0  # tokens 5 .. 8 have the three pages already


def test_a_row_goes_on_while_its_lower_bound_is_short_of_the_end() -> None:
    """With the upper bound, which counts all drafts in flight, the request would get no further step and never end."""
    s = scheduler()
    started(s, max_tokens=4)
    first = plan_of(s)  # at most tokens 5 to 8, of 7
    second = plan_of(s)  # the first may give only one of the three missing tokens
    take(s, first, [51])
    third = plan_of(s)
    assert s.schedule() is None  # two steps in flight give at least the two missing tokens
    take(s, second, [52])
    assert s.schedule() is None
    result = take(s, third, [53])
    assert [(r.key, reason) for r, reason in result.finished] == [(1, FinishReason("length"))]


def test_tokens_past_the_end_are_not_the_request_s() -> None:
    s = scheduler()
    started(s, max_tokens=3)
    result = take(s, plan_of(s), [51, 52, 53, 54])
    assert result.tokens.tolist() == [51, 52]
    assert [(r.key, reason) for r, reason in result.finished] == [(1, FinishReason("length"))]
    assert result.finished[0][0].tokens.tolist() == [1, 2, 3, 50, 51, 52]


@pytest.mark.parametrize(("at", "accepted"), [(0, 4), (1, 4), (3, 4), (1, 2)])
def test_a_stop_token_ends_a_row_s_run(at: int, accepted: int) -> None:
    s = scheduler()
    started(s, stop=(77,))
    tokens = [51, 52, 53, 54]
    tokens[at] = 77
    result = take(s, plan_of(s), tokens, accepted=[accepted])
    assert result.tokens.tolist() == tokens[: at + 1]
    assert [(r.key, reason) for r, reason in result.finished] == [(1, FinishReason("stop", 77))]
    assert not s.has_requests


def test_a_stop_token_among_rejected_drafts_ends_nothing() -> None:
    s = scheduler()
    started(s, stop=(77,))
    result = take(s, plan_of(s), [51, 77, 77, 77], accepted=[1])
    assert (result.tokens.tolist(), result.finished) == ([51], [])


def test_short_prompts_come_between_rows_that_decode_and_long_ones() -> None:
    s = scheduler()
    started(s)
    for key, length in ((2, 6), (3, 4), (4, 1)):
        s.add(make_request(key, [key * 10 + i for i in range(length)]))
    plan = plan_of(s)
    assert plan.keys.tolist() == [1, 3, 4, 2]
    assert plan.num_new.tolist() == [4, 4, 1, 6]
    assert plan.num_short.tolist() == [3]
    assert plan.tokens.tolist() == [0, 0, 0, 0, 30, 31, 32, 33, 40, 20, 21, 22, 23, 24, 25]


def test_a_page_table_has_room_for_drafts_beyond_the_context() -> None:
    """The last steps of a row that fills the context compute drafts beyond it, on pages of their own."""
    s = scheduler(page_size=1, context_length=12, num_usable_pages=18, step_tokens=16)
    started(s, max_tokens=9)
    most = 0
    for _ in range(4):
        first, second = plan_of(s), plan_of(s)
        most = max(most, *first.page_updates[1], *second.page_updates[1])
        take(s, first, [51])
        take(s, second, [52])
    assert not s.has_requests
    assert most == pages_per_row(12, W, 1) - 2  # counted from 0; and the very last token of a row is never computed
    assert s.table.page_table.shape[1] == pages_per_row(12, W, 1) == 18


def test_a_preempted_row_comes_back_with_what_was_known() -> None:
    s = scheduler(rows=2, num_usable_pages=6, context_length=16)
    for key in (1, 2):
        s.add(make_request(key, [key, 2, 3], max_tokens=12))
    take(s, plan_of(s), [50], [60])
    take(s, plan_of(s), [51, 52], [61, 62])
    in_flight = plan_of(s)  # to token 10 at most: three pages each
    after = plan_of(s)
    assert (after.keys.tolist(), s.counters.preemptions) == ([1], 1)
    assert take(s, in_flight, [53], [63, 64]).keys.tolist() == [1]  # the tokens of the other request are dropped
    take(s, after, [54])
    request = s.requests.get(2)
    assert request is not None
    assert request.tokens.tolist() == [2, 2, 3, 60, 61, 62]


def test_a_width_that_a_step_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16 tokens .*5 .*4 tokens"):
        make_scheduler(rows=5, step_tokens=16, width=lambda n: W)


def test_the_width_follows_the_number_of_rows() -> None:
    s = scheduler(width=lambda n: {1: 4, 2: 2}.get(n, 1))
    widths = []
    for key in range(1, 4):
        s.add(make_request(key, [key]))
        plan = plan_of(s)
        take(s, plan, *[[50 + key]] * len(plan.rows))
        widths.append(plan.width)
    assert widths == [4, 2, 1]
    assert plan_of(s).num_new.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("num_new", "width"), [(1, W), (2, 1)])
def test_a_step_is_wide_only_if_its_rows_fit_with_those_that_are_admitted(num_new: int, width: int) -> None:
    """The programs of width W hold no more rows than may speculate together, whatever the rows compute."""
    s = scheduler(width=lambda n: W if n <= 2 else 1)
    started(s)
    for key in range(2, 2 + num_new):
        s.add(make_request(key, [key, key, key]))
    plan = plan_of(s)
    assert (plan.width, len(plan.rows)) == (width, 1 + num_new)


def test_requests_that_wait_for_pages_leave_steps_wide() -> None:
    """Two rows fill the pool and go on with drafts while four requests wait; no step has more rows than may speculate."""
    s = scheduler(width=lambda n: W if n <= 2 else 1, num_usable_pages=14, rows=4)
    for key in range(1, 7):
        s.add(make_request(key, [key] * 13, max_tokens=9))
    wide_with_queue = 0
    for _ in range(200):
        plan = s.schedule()
        if plan is None:
            break
        assert plan.width == 1 or len(plan.rows) <= 2
        wide_with_queue += plan.width == W and bool(plan.from_device.all()) and len(s.waiting) > 0
        accepted = np.where(plan.from_device, min(2, plan.width), 1)
        s.process(plan, step_tokens(plan, np.full((len(plan.rows), plan.width), 9), accepted))
        s.check_invariants()
    assert not s.has_requests
    assert wide_with_queue > 3


def three_decoding(**options) -> Scheduler:
    s = scheduler(**options)
    for key in (1, 2, 3):
        s.add(make_request(key, [key]))
    take(s, plan_of(s), [50], [60], [70])
    return s


def drafts_counted(s: Scheduler) -> tuple[int, int, int, list[int]]:
    c = s.counters
    return c.draft_steps, c.drafted_tokens, c.accepted_drafts, c.accepted_per_position


def test_drafts_are_counted_by_request_and_by_their_place_in_the_row() -> None:
    s = three_decoding()
    assert drafts_counted(s) == (0, 0, 0, [0, 0, 0])  # the rows of a prompt have none
    result = take(s, plan_of(s), [51, 52, 53, 54], [61, 62], [71])
    assert result.drafts.tolist() == [[1, 3, 3], [2, 3, 1], [3, 3, 0]]
    assert drafts_counted(s) == (3, 9, 4, [2, 1, 1])
    take(s, plan_of(s), [55, 56], [63], [72, 73, 74])
    assert drafts_counted(s) == (6, 18, 7, [4, 2, 1])


def test_rows_without_drafts_and_rows_that_changed_hands_do_not_count() -> None:
    s = three_decoding()
    plan = plan_of(s)
    s.abort(3)
    result = take(s, plan, [51], [61, 62], [71, 72], drafted=[0, 2, 3])
    assert result.drafts.tolist() == [[2, 2, 1]]
    assert drafts_counted(s) == (1, 2, 1, [1, 0, 0])


def test_drafts_behind_a_stop_token_count_as_accepted() -> None:
    """The drafter was right about them; how a request ends must not change the rate."""
    s = scheduler()
    started(s, stop=(77,))
    result = take(s, plan_of(s), [51, 77, 52, 53])
    assert (result.tokens.tolist(), result.drafts.tolist()) == ([51, 77], [[1, 3, 3]])
    assert drafts_counted(s) == (1, 3, 3, [1, 1, 1])


def test_steps_of_other_widths_count_in_the_same_places() -> None:
    s = three_decoding(width=lambda n: 2 if n > 2 else W)
    result = take(s, plan_of(s), [51, 52], [61], [71, 72])
    assert result.drafts.tolist() == [[1, 1, 1], [2, 1, 0], [3, 1, 1]]
    assert drafts_counted(s) == (3, 3, 2, [2, 0, 0])


def test_without_speculation_there_are_no_places() -> None:
    s = three_decoding(width=lambda n: 1)
    assert take(s, plan_of(s), [51], [61], [71]).drafts.shape == (0, 3)
    assert drafts_counted(s) == (0, 0, 0, [])


def test_requests_are_admitted_where_fewer_rows_than_they_are_would_have_a_narrow_step() -> None:
    s = scheduler(width=lambda num_rows: W if num_rows > 1 else 1)
    s.add(make_request(1, [1, 2, 3]))
    s.add(make_request(2, [4, 5, 6]))
    plan = plan_of(s)
    assert (plan.width, plan.keys.tolist()) == (W, [1, 2])
