"""Greedy tokens of two platforms: equal, or different where two were as good."""

from __future__ import annotations

import math

from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.tools.selftest.exactness import GreedyAnswer, compare, greedy_answers


def answer(tokens: list[int], best: float = -1.0, gap: float = 0.5) -> GreedyAnswer:
    return GreedyAnswer(tokens, [TokenLogprobs(best, [token, token + 1], [best, best - gap]) for token in tokens])


def test_equal_tokens_pass_with_the_largest_difference() -> None:
    found = compare([answer([1, 2]), answer([3])], [answer([1, 2], best=-1.0005), answer([3])])
    assert (found.tokens, found.equal, found.gaps, found.passed) == (3, 3, [], True)
    assert math.isclose(found.largest_difference, 0.0005, rel_tol=1e-6)
    assert not compare([answer([1])], [answer([1], best=-1.01)]).passed


def test_a_different_token_passes_only_where_two_were_as_good() -> None:
    tie = compare([answer([1, 2, 3], gap=0.001)], [answer([1, 7, 9], gap=0.001)])
    assert (tie.equal, tie.passed) == (1, True)  # the token behind it has another prompt
    wrong = compare([answer([1, 2, 3])], [answer([1, 7, 9])])
    assert (wrong.equal, wrong.gaps, wrong.passed) == (1, [0.5], False)


def test_a_platform_gives_the_best_tokens_and_the_same_ones_again() -> None:
    answers = greedy_answers("cpu", 1, None)
    assert [len(each.tokens) for each in answers] == [32, 32]
    for each in answers:
        assert each.tokens == [logprobs.top_ids[0] for logprobs in each.logprobs]
    assert compare(answers, answers).passed
