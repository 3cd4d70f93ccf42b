"""Tests of the choice of a step's width."""

from __future__ import annotations

from sgl_jax.scheduler.widths import Widths

W = 4


def steps(widths: Widths, number: int, gain: float, rows: int = 2) -> list[int]:
    """Run steps of `rows` rows that gain so many tokens each in a wide step; return their widths."""
    chosen = []
    for _ in range(number):
        chosen.append(widths(rows))
        widths.observe(chosen[-1], rows, round(rows * (gain if chosen[-1] > 1 else 1)))
    return chosen


def test_few_rows_verify_drafts_and_many_do_not() -> None:
    widths = Widths(W, 8, 0.25)
    assert [widths(n) for n in (1, 8, 9, 100)] == [W, W, 1, 1]
    assert Widths(1, 8)(1) == 1


def test_drafts_that_pay_are_verified_in_every_step() -> None:
    assert set(steps(Widths(W, 8, 0.25), 1000, gain=1.5)) == {W}


def test_drafts_that_do_not_pay_are_tried_ever_more_seldom() -> None:
    widths = Widths(W, 8, 0.25)
    chosen = steps(widths, 5000, gain=1.0)
    assert chosen[:32] == [W] * 32  # the first are judged together
    pauses = [len(run) for run in "".join("w" if width > 1 else "-" for width in chosen).split("w") if run]
    assert pauses[:6] == [64, 128, 256, 512, 1024, 1024]
    assert sum(width > 1 for width in chosen[32:]) < 0.03 * len(chosen)


def test_drafts_that_begin_to_pay_are_kept() -> None:
    widths = Widths(W, 8, 0.25)
    steps(widths, 40, gain=1.0)
    chosen = steps(widths, 300, gain=3.0)
    assert chosen[-200:] == [W] * 200
    later = steps(widths, 200, gain=1.0)  # and judged anew, with a short pause again
    assert later.count(1) >= 64


def test_steps_of_more_rows_neither_pay_nor_cost() -> None:
    """While many requests run drafts are not judged, and the first wide steps afterwards have none."""
    widths = Widths(W, 2, 0.45)
    for _ in range(200):
        widths.observe(widths(5), 5, 5)
    for _ in range(2):
        widths.observe(widths(2), 2, 2)
    assert set(steps(widths, 100, gain=2.0)) == {W}


def test_more_rows_need_more_accepted_drafts_beyond_the_ridge() -> None:
    """With a ridge of 32, wide steps of 8 and 16 rows of 4 tokens take 1.33 and 2 times as long as others; far below it they take as long."""
    for rows, pays, does_not in ((10, 1.1, 1.0), (8, 1.5, 1.25), (16, 2.125, 2.0)):
        ridge = 320 if rows == 10 else 32
        assert steps(Widths(W, 16, 0.05, ridge), 33, gain=pays, rows=rows)[-1] == W
        assert steps(Widths(W, 16, 0.05, ridge), 33, gain=does_not, rows=rows)[-1] == 1
