"""The sampler of each library for CPUs gives the tokens of plain XLA's, for lines of every kind, and its log probabilities."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sampler as plain

from sgl_jax.ops.cpu.library import Library, processor_flags, register, usable
from sgl_jax.request import MAX_LOGPROBS, SamplingParams
from sgl_jax.runtime import sampler

LIBRARIES = usable(processor_flags())
NUM_LINES = 96

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no library was built, as no C++ compiler was there")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return register(LIBRARIES[request.param])


def any_rows(vocab_size: int, seed: int) -> Iterator[plain.Row]:
    """Yield rows with any mix of parameters, bias, penalties and masks."""
    rng = np.random.default_rng(seed)

    def some(number: int) -> list[int]:
        return rng.integers(0, vocab_size, number).tolist()

    for i in range(NUM_LINES):
        params = {
            "temperature": float(rng.choice([0.0, 0.01, 0.7, 1.0, 1.5])),
            "top_k": int(rng.choice([-1, 1, 5, 200])),
            "top_p": float(rng.choice([1.0, 0.95, 0.5, 0.01])),
            "min_p": float(rng.choice([0.0, 0.05, 1.0])),
        }
        if i % 3 == 0:
            params |= {"presence_penalty": 0.5, "frequency_penalty": -0.3, "repetition_penalty": 1.2}
        if i % 4 == 0:
            params |= {"logit_bias": dict.fromkeys(some(5), 3.0) | dict.fromkeys(some(5), -100.0)}
        allowed = tuple(some(7)) if i % 5 == 0 else ()
        if allowed:
            params["regex"] = "x"
        seed = int(rng.integers(0, 2**31))
        yield plain.Row(SamplingParams(**params), [0, *some(20)], some(int(rng.integers(0, 15))), seed, (), allowed)


@pytest.mark.parametrize("vocab_size", [1, 3, 17, 300, 5003])
def test_every_kind_of_line_gets_the_token_of_plain_xla(library: Library, vocab_size: int) -> None:
    rows = list(any_rows(vocab_size, vocab_size))
    lines, state = plain.step_of(rows, vocab_size, NUM_LINES + 5)  # the last ones do not sample
    by_library = jax.jit(functools.partial(sampler.sample, library=library))
    num_distinct = 0
    for spread in (0.1, 3.0, 30.0):
        shape = (NUM_LINES + 5, vocab_size)
        logits = (np.random.default_rng(7).standard_normal(shape) * spread).astype(np.float32)
        wanted = np.asarray(plain._sample(logits, lines, state))[:NUM_LINES]
        np.testing.assert_array_equal(np.asarray(by_library(logits, lines, state))[:NUM_LINES], wanted)
        num_distinct += len(set(wanted.tolist()))
    assert num_distinct > min(vocab_size, 60)


@pytest.mark.parametrize("filters", plain.FILTERS, ids=str)
def test_tokens_are_drawn_from_the_filtered_distribution(
    library: Library, filters: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_sample", _sampler_of(library))
    logits = plain.peaked(1000)
    plain.assert_drawn_from(plain.draws(logits, **filters), plain.distribution(logits, **filters))


@functools.cache
def _sampler_of(library: Library):
    return jax.jit(functools.partial(sampler.sample, library=library))


def test_greedy_takes_the_first_of_equals(library: Library) -> None:
    rows = [plain.Row(SamplingParams(temperature=0.0))] * 3
    logits = np.zeros((3, 1037), np.float32)
    logits[0, [900, 31]], logits[1, [1036]], logits[2] = 1.0, 2.0, -np.inf
    lines, state = plain.step_of(rows, 1037, 3)
    assert np.asarray(_sampler_of(library)(logits, lines, state)).tolist() == [31, 1036, 0]


@pytest.mark.parametrize("vocab_size", [5, 1000])
@pytest.mark.parametrize("wanted", [True, False])
def test_log_probabilities_are_those_of_plain_xla(library: Library, vocab_size: int, wanted: bool) -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((9, vocab_size)), jnp.float32).round(1)
    chosen = jnp.arange(9) % vocab_size
    plainly = sampler.token_logprobs(logits, chosen, jnp.bool_(wanted))
    got = jax.jit(functools.partial(sampler.token_logprobs, library=library))(logits, chosen, jnp.bool_(wanted))
    np.testing.assert_array_equal(got.top_ids, plainly.top_ids)
    np.testing.assert_allclose(got.chosen, plainly.chosen, atol=2e-6)
    np.testing.assert_allclose(got.top_logprobs, plainly.top_logprobs, atol=2e-6)
    assert got.top_ids.shape == (9, MAX_LOGPROBS)
    assert bool(np.any(got.chosen)) is wanted
