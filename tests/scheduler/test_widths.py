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
    widths = Widths(W, 8, 1.3)
    assert [widths(n) for n in (1, 8, 9, 100)] == [W, W, 1, 1]
    assert Widths(1, 8, 1.3)(1) == 1


def test_drafts_that_pay_are_verified_in_every_step() -> None:
    assert set(steps(Widths(W, 8, 1.3), 1000, gain=1.5)) == {W}


def test_drafts_that_do_not_pay_are_tried_ever_more_seldom() -> None:
    widths = Widths(W, 8, 1.3)
    chosen = steps(widths, 5000, gain=1.0)
    assert chosen[:32] == [W] * 32  # the first are judged together
    pauses = [len(run) for run in "".join("w" if width > 1 else "-" for width in chosen).split("w") if run]
    assert pauses[:6] == [64, 128, 256, 512, 1024, 1024]
    assert sum(width > 1 for width in chosen[32:]) < 0.03 * len(chosen)


def test_drafts_that_begin_to_pay_are_kept() -> None:
    widths = Widths(W, 8, 1.3)
    steps(widths, 40, gain=1.0)
    chosen = steps(widths, 300, gain=3.0)
    assert chosen[-200:] == [W] * 200
    later = steps(widths, 200, gain=1.0)  # and judged anew, with a short pause again
    assert later.count(1) >= 64


def test_steps_of_more_rows_neither_pay_nor_cost() -> None:
    """While many requests run drafts are not judged, and the first wide steps afterwards have none."""
    widths = Widths(W, 2, 1.5)
    for _ in range(200):
        widths.observe(widths(5), 5, 5)
    for _ in range(2):
        widths.observe(widths(2), 2, 2)
    assert set(steps(widths, 100, gain=2.0)) == {W}
