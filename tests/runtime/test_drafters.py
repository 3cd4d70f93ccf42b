"""Tests of drafters in the real step."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_runner import small_core, small_runner
from test_speculate import check, run

from sgl_jax.runtime.drafters import by_ngram, ngram_drafts
from sgl_jax.runtime.runner import ModelRunner
from simulated import Client

NGRAM = functools.partial(by_ngram, min_ngram=1, max_ngram=4)


@pytest.fixture(scope="module")
def expected(stories260k: Path) -> Client:
    return run(small_runner(stories260k))


@pytest.fixture(scope="module")
def by_ngrams(stories260k: Path, expected: Client) -> ModelRunner:
    return small_runner(stories260k, widths=(1, 2, 4), drafter=NGRAM, keeps_tokens=True)


@pytest.mark.parametrize(
    ("tokens", "ngram", "drafts"),
    [
        ([5, 6, 7, 8, 1, 5, 6], (1, 4), [7, 8, 1]),
        ([5, 6, 7, 9, 6, 8, 1, 5, 6], (1, 4), [7, 9, 6]),  # the longer match, not the later one
        ([5, 6, 7, 9, 5, 6, 8, 1, 5, 6], (1, 4), [8, 1, 5]),  # the later of two equal ones
        ([1, 2, 3, 4, 1, 2, 3], (1, 1), [4, 1, 2]),
        ([1, 3, 3], (1, 4), [3, 3, 3]),  # a period of one token goes on
        ([7, 1, 2, 1, 2], (1, 4), [1, 2, 1]),
        ([1, 2, 3, 4], (1, 4), [-1, -1, -1]),
        ([1, 2, 9, 4, 2], (2, 4), [-1, -1, -1]),  # the match is too short
        ([0], (1, 4), [-1, -1, -1]),
        ([0, 0], (1, 4), [0, 0, 0]),
    ],
)
def test_an_ngram_is_continued_as_it_was_before(tokens: list[int], ngram: tuple[int, int], drafts: list[int]) -> None:
    others = np.full((3, 16), 6, np.int32)
    others[1, : len(tokens)] = tokens
    found = ngram_drafts(jnp.asarray(others), jnp.array([4, len(tokens), 16]), 3, *ngram)
    assert found.tolist() == [[6, 6, 6], drafts, [6, 6, 6]]


def test_limited_drafts_are_one_token_longer_than_their_match() -> None:
    tokens = jnp.asarray(
        [[5, 6, 7, 8, 1, 5, 6, 0, 0], [6, 7, 8, 9, 1, 2, 6, 0, 0], [1, 2, 3, 4, 5, 6, 7, 0, 0], [6] * 9]
    )
    found = ngram_drafts(tokens, jnp.array([7, 7, 7, 9]), 5, 1, 3, limited=True)
    assert found.tolist() == [[7, 8, 1, -1, -1], [7, 8, -1, -1, -1], [-1] * 5, [6, 6, 6, 6, -1]]


@pytest.mark.parametrize("overlap", [True, False])
def test_output_does_not_depend_on_ngrams(by_ngrams: ModelRunner, expected: Client, overlap: bool) -> None:
    check(run(by_ngrams, overlap=overlap), expected)
    check(run(by_ngrams, overlap=overlap, num_pages=16, width=lambda n: {1: 4, 2: 2}.get(n, 1)), expected)
    assert by_ngrams.compiles_after_ready == 0


def test_ngrams_are_found_in_the_prompt_also_behind_a_cached_prefix(by_ngrams: ModelRunner) -> None:
    """With the first token every draft comes from the prompt, whose tokens are not computed again."""
    client = Client(small_core(by_ngrams, overlap=False))
    prompt = [1, *[300] * 19]
    for key, num_cached in enumerate((0, 16)):
        before = client.core.scheduler.counters.steps
        client.submit(key, prompt, max_tokens=25, ignore_eos=True, temperature=0.0, logit_bias={300: 100.0})
        client.run()
        answer = client.answers[key]
        assert answer.tokens == [300] * 25
        assert client.core.scheduler.counters.steps - before == 1 + 24 // 4
        assert answer.prompt is not None
        assert answer.prompt.num_cached_tokens == num_cached
