"""Tests of the fake device: it detects plans that a real device would compute wrongly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fakes.fake_runner import FakeRunner, kv_chain, token_of
from sgl_jax.step_plan import StepPlan

PAGE = 4


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def plan(
    rank: list[int],
    pages: list[int],
    *,
    num_new: int | list[int] = 3,
    start: int | list[int] = 0,
    width: int = 1,
    **changes,
) -> StepPlan:
    """Make a plan in which row i, of rank[i], computes num_new tokens [i, i, …] and pages[i] becomes its first page."""
    n = len(rank)
    new = np.broadcast_to(ints(*np.atleast_1d(num_new)), n).copy()
    built = StepPlan.of(
        new,
        num_ranks=2,
        width=width,
        rank=ints(*rank),
        start=np.broadcast_to(ints(*np.atleast_1d(start)), n),
        tokens=np.repeat(np.arange(n, dtype=np.int32), new),
        page_updates=np.array([[i, 0, page] for i, page in enumerate(pages)], np.int32).reshape(-1, 3).T,
    )
    return dataclasses.replace(built, **changes)


def decode(rank: list[int]) -> StepPlan:
    """Make a plan in which the rows decode after three tokens."""
    return plan(rank, [], start=3, num_new=1, from_device=np.ones(len(rank), np.bool_))


def two_ranks() -> FakeRunner:
    return FakeRunner(num_rows=4, num_pages=4, page_size=PAGE, context_length=16, num_ranks=2)


def right(row: int) -> int:
    return token_of(kv_chain([row] * 3), 512)


def test_one_page_id_on_two_ranks_is_two_pages() -> None:
    runner = two_ranks()
    result = runner.launch(plan([0, 1], [1, 1])).collect()
    assert result.tokens[:, 0].tolist() == [right(0), right(1)]
    result = runner.launch(decode([0, 1])).collect()
    assert result.tokens[:, 0].tolist() == [token_of(kv_chain([i] * 3 + [right(i)]), 512) for i in (0, 1)]


def test_one_page_for_two_rows_of_a_rank_is_found_when_both_write() -> None:
    with pytest.raises(AssertionError, match="two rows write"):
        two_ranks().launch(plan([1, 1], [2, 2]))


def test_one_page_for_two_rows_of_a_rank_is_found_when_one_reads() -> None:
    runner = two_ranks()
    runner.launch(plan([1], [2]))
    with pytest.raises(AssertionError, match=r"row reads .*another writes"):
        runner.launch(plan([1, 1], [2, 2], num_new=1, start=[3, 2]))


def test_a_page_that_another_row_wrote_since_gives_a_wrong_token() -> None:
    runner = two_ranks()
    runner.launch(plan([1], [2]))
    runner.launch(plan([1], [], rows=ints(1), page_updates=ints(1, 0, 2)[:, None], tokens=ints(7, 7, 7)))
    expected = token_of(kv_chain([0] * 3 + [right(0)]), 512)
    assert runner.launch(decode([1])).result.tokens[0, 0] != expected


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (plan([1, 0], [1, 1]), "by rank"),
        (plan([0, 2], [1, 1], num_short=ints(0, 0)), "0 to 2 of 2"),
        (plan([0, 1], [1, 1], num_new=1, num_short=ints(2)), "one number a rank"),
        (plan([0, 1], [1, 1], num_new=1, num_short=ints(2, 0)), "rank 0 .*1 short"),
        (plan([0, 0, 1], [1, 2, 1], num_new=[2, 1, 1]), "short rows .*first"),
        (plan([0, 1], [1, 4]), "page 4 of 4"),
    ],
)
def test_a_plan_that_breaks_its_promises_is_refused(broken: StepPlan, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        two_ranks().launch(broken)


def test_single_tokens_of_a_rank_may_follow_the_prompts_of_the_rank_before() -> None:
    runner = two_ranks()
    result = runner.launch(plan([0, 1, 1], [1, 1, 2], num_new=[3, 1, 3])).collect()
    assert result.tokens[[0, 2], 0].tolist() == [right(0), right(2)]


def test_a_row_that_decodes_stays_on_its_rank() -> None:
    runner = two_ranks()
    runner.launch(plan([0], [1]))
    with pytest.raises(AssertionError, match="another rank"):
        runner.launch(decode([1]))
