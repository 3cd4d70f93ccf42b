"""Tests of the choice of a step's width."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from sgl_jax.scheduler.widths import Widths

W = 4


def steps(widths: Widths, number: int, gain: float, rows: int = 2) -> list[int]:
    """Run steps of `rows` rows that gain so many tokens each in a wide step; return their widths."""
    chosen = []
    for _ in range(number):
        chosen.append(widths(rows))
        widths.observe(chosen[-1], rows, rows, round(rows * (gain if chosen[-1] > 1 else 1)))
    return chosen


def test_few_rows_verify_drafts_and_many_do_not() -> None:
    widths = Widths(W, 8, 0.25)
    assert [widths(n) for n in (1, 8, 9, 100)] == [W, W, 1, 1]
    assert Widths(1, 8)(1) == 1


def test_drafts_that_pay_are_verified_in_every_step() -> None:
    assert set(steps(Widths(W, 8, 0.25), 1000, gain=1.5)) == {W}


def test_drafts_that_do_not_pay_are_tried_ever_more_seldom_until_a_try_costs_little() -> None:
    for draft_cost, longest in ((0.01, 64), (0.25, 300), (0.5, 600), (9.0, 4096)):
        chosen = steps(Widths(W, 8, draft_cost), 20000, gain=1.0)
        tries = "".join("w" if width > 1 else "-" for width in chosen)
        assert tries.startswith("w" * 32 + "-")  # the first are judged together
        pauses = [len(pause) for pause in re.findall("-+", tries)]
        assert pauses[:7] == [min(64 * 2**number, longest) for number in range(7)]


def test_drafts_that_begin_to_pay_are_kept() -> None:
    widths = Widths(W, 8, 0.25)
    steps(widths, 40, gain=1.0)
    chosen = steps(widths, 1200, gain=3.0)
    assert chosen[-200:] == [W] * 200
    later = steps(widths, 200, gain=1.0)  # and judged anew, with a short pause again
    assert later.count(1) >= 64


def test_steps_of_more_rows_neither_pay_nor_cost() -> None:
    """While many requests run drafts are not judged, and the first wide steps afterwards have none."""
    widths = Widths(W, 2, 0.45)
    for _ in range(200):
        widths.observe(widths(5), 5, 5, 5)
    for _ in range(2):
        widths.observe(widths(2), 2, 2, 2)
    assert set(steps(widths, 100, gain=2.0)) == {W}


def timed_steps(
    widths: Widths, number: int, rows: int, gain: float, cost: Callable[[int], float]
) -> tuple[float, float]:
    """Run steps that take a second, and wide ones the cost at that step. Return the tokens of a row, and the seconds."""
    tokens = seconds = 0.0
    for i in range(number):
        width = widths(rows)
        taken, gained = (cost(i), gain) if width > 1 else (1.0, 1.0)
        widths.observe(width, rows, rows, round(rows * gained), taken)
        tokens, seconds = tokens + gained, seconds + taken
    return tokens, seconds


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("cost", [1.1, 1.5, 1.9, 2.1, 2.5, 4.0])
def test_what_wide_steps_cost_is_measured_and_no_launch_loses_by_drafts(rows: int, cost: float) -> None:
    """Drafts were expected to cost a quarter of a step. They gain two tokens; what the first tries lose is left out."""
    timed_steps(widths := Widths(W, 8, 0.25), 8000, rows, 2.0, lambda step: cost)
    tokens, seconds = timed_steps(widths, 8000, rows, 2.0, lambda step: cost)
    assert tokens / seconds > 0.97 * max(1.0, 2.0 / cost)


def test_a_cost_that_changes_is_noticed() -> None:
    slower = timed_steps(Widths(W, 8, 0.25), 20000, 2, 2.0, lambda step: 1.2 if step < 10000 else 3.0)
    assert slower[0] / slower[1] > 0.97 * 30000 / (10000 * 1.2 + 10000)
    faster = timed_steps(Widths(W, 8, 0.25), 20000, 2, 2.0, lambda step: 3.0 if step < 10000 else 1.2)
    assert faster[0] / faster[1] > 0.9 * 30000 / (10000 + 10000 * 1.2)


def test_a_step_s_cost_is_the_mean_of_steps_with_many_drafts_and_with_none() -> None:
    """The median of these times is below what the drafts gain, and their mean above it."""
    times = [1.2, 2.9, 1.2, 2.9, 1.2]
    for gain, pays in ((3, False), (4, True)):  # tokens of two rows; the mean of the times is 1.88
        widths, chosen = Widths(W, 8), []
        for number in range(3000):
            chosen.append(widths(2))
            wide = chosen[-1] > 1
            widths.observe(chosen[-1], 2, 2, gain if wide else 2, times[number % 5] if wide else 1.0)
        assert (chosen[1000:].count(W) > 1000) == pays


def test_each_number_of_rows_is_judged_by_itself() -> None:
    widths = Widths(W, 8, 0.25)
    timed_steps(widths, 200, 4, 2.0, lambda step: 2.5)
    assert (widths(3), widths(4), widths(1), widths(8)) == (1, 1, W, W)
    timed_steps(widths, 200, 1, 2.0, lambda step: 1.5)
    assert (widths(4), widths(1)) == (1, W)


def test_steps_with_prompts_say_what_drafts_gain_and_nothing_of_their_cost() -> None:
    widths = Widths(W, 8, 0.25)
    timed_steps(widths, 200, 1, 2.0, lambda step: 1.5)
    for _ in range(100):
        widths.observe(W, 1, 1, 2, None)
    assert widths(1) == W


def test_drafts_go_on_where_no_step_without_them_can_be_timed() -> None:
    widths, chosen = Widths(W, 8, 0.25), []
    for _ in range(500):
        chosen.append(widths(1))
        widths.observe(chosen[-1], 1, 1, 2 if chosen[-1] > 1 else 1, 1.0 if chosen[-1] > 1 else None)
    assert chosen.count(1) == 6 * 8  # tried after each window


def test_a_machine_that_becomes_slower_does_not_make_drafts_look_dear() -> None:
    widths = Widths(W, 8, 0.25)
    timed_steps(widths, 200, 1, 2.0, lambda step: 1.5)
    for _ in range(300):
        width = widths(1)
        widths.observe(width, 1, 1, 2 if width > 1 else 1, 4.5 if width > 1 else 3.0)
    assert widths(1) == W


def test_a_step_counts_for_the_number_of_rows_that_its_width_was_chosen_for() -> None:
    """Some of them may have prompts, or be those of one of several ranks."""
    widths, chosen = Widths(W, 8, 0.25), []
    for num_rows in [7] * 400 + [1] * 400:
        chosen.append(widths(2))
        gained = 2 * num_rows if chosen[-1] > 1 else num_rows
        widths.observe(chosen[-1], 2, num_rows, gained, 3.0 if chosen[-1] > 1 else 1.0)
    assert {*chosen[100:400]} == {*chosen[400:]} == {1, W}  # tried again and again
    assert widths(7) == W
