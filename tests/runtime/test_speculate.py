"""Tests of rows of width W in the real step: the output equals that of W = 1, with good drafts and with bad ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_runner import small_core, small_runner

from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.runtime import speculate
from sgl_jax.runtime.device_state import NO_DRAFT, DeviceState
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.programs import STATE
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.runtime.speculate import RowTokens, Verified
from sgl_jax.runtime.step_spec import Drafter, Pools, StepSpec
from simulated import Client

W, VOCAB = 4, 512
STORY = [1, 403, 407, 261, 378]
CASES: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.3, "seed": -7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logit_bias": {300: 6.0}, "min_tokens": 20, "stop_token_ids": (300, 261)},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "seed": 11, "logprobs": 1, "frequency_penalty": 0.4},
]


def run(runner: ModelRunner, **options) -> Client:
    """Make twelve requests, more than there are rows, with prompts of several lengths and common beginnings."""
    client = Client(small_core(runner, **options))
    for key in range(12):
        prompt = [*STORY * (key % 3), *STORY[: 1 + key % 5]]
        client.submit(key, prompt, max_tokens=30 - key, ignore_eos=key % 4 > 0, **CASES[key % len(CASES)])
    client.run()
    return client


@pytest.fixture(scope="module")
def plain(stories260k: Path) -> ModelRunner:
    return small_runner(stories260k)


@pytest.fixture(scope="module")
def expected(plain: ModelRunner) -> Client:
    return run(plain)


def an_oracle(expected: Client, wrong_every: int) -> Drafter:
    """Make a drafter that knows the requests' tokens, by length and last token, and guesses some of them wrong."""
    sequences = [[*a.request.prompt.tolist(), *a.tokens] for a in expected.answers.values()]
    table = np.full((len(sequences), 128), NO_DRAFT, np.int32)
    for i, tokens in enumerate(sequences):
        table[i, : len(tokens)] = tokens
    known = jnp.asarray(table)

    def drafts(length: jnp.ndarray, last_token: jnp.ndarray) -> jnp.ndarray:
        at = length[:, None] + 1 + jnp.arange(W - 1)
        fits = last_token[:, None] == known[:, length].T  # [S, sequences]
        found = known[jnp.argmax(fits, axis=1)[:, None], at]
        is_wrong = (last_token[:, None] + at) % wrong_every == 0
        return jnp.where(is_wrong, (found + 1) % VOCAB, found)

    return drafter_of(drafts)


def drafter_of(drafts: Callable[[jnp.ndarray, jnp.ndarray], jnp.ndarray]) -> Drafter:
    """Make a drafter of a function from each row's length and last token to its drafts, [S, W - 1]."""

    def drafter(after: Verified, spec: StepSpec, layout: PlanLayout) -> tuple[Pools, DeviceState]:
        rows, state = after.inputs.rows, after.state
        return after.pools, speculate.with_drafts(state, rows, drafts(state.length[rows], state.last_token[rows]))

    return drafter


def no_drafts(length: jnp.ndarray, last_token: jnp.ndarray) -> jnp.ndarray:
    return jnp.full((len(length), W - 1), NO_DRAFT, jnp.int32)


def the_same_again(length: jnp.ndarray, last_token: jnp.ndarray) -> jnp.ndarray:
    return jnp.repeat(last_token[:, None], W - 1, axis=1)


DRAFTERS: dict[str, Callable[[Client], Drafter]] = {
    "none": lambda expected: drafter_of(no_drafts),
    "the same again": lambda expected: drafter_of(the_same_again),
    "right": lambda expected: an_oracle(expected, 10**6),
    "often right": lambda expected: an_oracle(expected, 5),
}


def check(client: Client, expected: Client) -> None:
    """Answers are equal to those of W = 1."""
    for key, right in expected.answers.items():
        answer = client.answers[key]
        assert (answer.tokens, answer.reason) == (right.tokens, right.reason), key
        assert_close(answer.logprobs, right.logprobs)
        assert answer.prompt is not None
        assert right.prompt is not None
        assert (answer.prompt.logprobs is None) == (right.prompt.logprobs is None)
        assert_close((answer.prompt.logprobs or [])[1:], (right.prompt.logprobs or [])[1:])


def assert_close(ours: Sequence[TokenLogprobs | None], theirs: Sequence[TokenLogprobs | None]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our is not None
        assert their is not None
        assert our.top_ids == their.top_ids
        np.testing.assert_allclose([our.logprob, *our.top_logprobs], [their.logprob, *their.top_logprobs], atol=1e-4)


def state_of(runner: ModelRunner) -> DeviceState:
    state = runner._values[STATE]
    assert isinstance(state, DeviceState)
    return state


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_output_does_not_depend_on_drafts(stories260k: Path, expected: Client, drafter: str) -> None:
    runner = small_runner(stories260k, widths=(W,), drafter=DRAFTERS[drafter](expected))
    for overlap in (True, False):
        client = run(runner, overlap=overlap)
        check(client, expected)
        counters = client.core.scheduler.counters
        if drafter == "none":
            assert counters.draft_steps == 0
        if drafter == "the same again":
            assert counters.drafted_tokens == (W - 1) * counters.draft_steps > 0
        if drafter == "right":
            assert counters.steps < 0.6 * expected.core.scheduler.counters.steps
            assert counters.accepted_drafts > 0.8 * counters.drafted_tokens > 0  # it takes some requests for others


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_simulated_acceptance_takes_a_share_of_drafts_right_or_wrong(
    stories260k: Path, expected: Client, share: float
) -> None:
    drafter = drafter_of(the_same_again) if share else an_oracle(expected, 10**6)
    client = run(small_runner(stories260k, widths=(W,), drafter=drafter, simulated_acceptance=share))
    counters = client.core.scheduler.counters
    assert counters.draft_steps > 40
    first = counters.accepted_per_position[0] / counters.draft_steps
    assert first == pytest.approx(share, abs=0.15 if share == 0.6 else 0)
    if share == 1:  # each token is repeated, as it was drafted
        tokens = client.tokens[11]
        assert tokens == [each for each in tokens[1:-1:W] for _ in range(W)][-len(tokens) :] or tokens


def test_output_does_not_depend_on_widths_that_change_with_the_batch_nor_on_preemption(
    stories260k: Path, expected: Client
) -> None:
    runner = small_runner(stories260k, widths=(1, 2, W), drafter=an_oracle(expected, 5))
    for width in (lambda n: {1: W, 2: 2}.get(n, 1), lambda n: W if n % 2 else 1):
        client = run(runner, width=width, num_pages=16)
        check(client, expected)
        assert client.core.scheduler.counters.preemptions > 0
    assert runner.compiles_after_ready == 0


def test_without_a_drafter_rows_of_width_w_have_no_drafts(stories260k: Path, expected: Client) -> None:
    runner = small_runner(stories260k, widths=(W,))
    for _ in range(2):  # after the start, and again after steps
        assert (np.asarray(state_of(runner).draft) == NO_DRAFT).all()
        check(run(runner), expected)


def test_a_request_that_is_not_to_speculate_gains_one_token_a_step(stories260k: Path, plain: ModelRunner) -> None:
    def submit(client: Client, **params) -> Client:
        for key in range(2):
            client.submit(key, [*STORY, 100 + key], max_tokens=30, ignore_eos=True, temperature=0.0, **params)
            params = {}  # the second request speculates
        return client

    expected = submit(Client(small_core(plain)))
    expected.run()
    runner = small_runner(stories260k, widths=(W,), drafter=an_oracle(expected, 10**6))
    client = submit(Client(small_core(runner)), disable_speculation=True)
    gains: dict[int, set[int]] = {0: set(), 1: set()}
    while client.core.busy:
        before = {key: len(answer.tokens) for key, answer in client.answers.items()}
        client.step()
        for key, answer in client.answers.items():
            gains[key].add(len(answer.tokens) - before[key])
    check(client, expected)
    assert gains[0] == {0, 1}
    assert max(gains[1]) == W


def test_a_step_writes_the_length_of_rows_that_do_not_decode(plain: ModelRunner) -> None:
    """Otherwise a row's first decode step would start where the request before it ended."""
    client = Client(small_core(plain, overlap=False))
    client.submit(0, [1, *range(100, 140)], max_tokens=8, ignore_eos=True)
    client.step()  # 32 tokens of the prompt
    row = client.answers[0].request.row
    assert int(state_of(plain).length[row]) == 32
    client.step()
    assert int(state_of(plain).length[row]) == 41
    client.run()


@pytest.mark.parametrize(
    ("sampled", "drafts", "accepted"),
    [
        ([5, 6, 7, 8], [5, 6, 7], 4),
        ([5, 6, 7, 8], [5, 6, 9], 3),
        ([5, 6, 7, 8], [9, 6, 7], 1),  # tokens after a wrong draft were computed from it
        ([5, 6, 7, 8], [NO_DRAFT] * 3, 1),
        ([5, 6, 7, 8], [5, NO_DRAFT, 7], 2),
        ([5], [], 1),
    ],
)
def test_drafts_hold_up_to_the_first_that_differs(sampled: list[int], drafts: list[int], accepted: int) -> None:
    drafts_array = jnp.asarray(drafts, jnp.int32).reshape(1, -1)
    assert speculate.count_accepted(jnp.asarray([sampled]), drafts_array).tolist() == [accepted]


def test_lines_of_a_row_that_decodes_follow_each_other_and_a_prompt_has_one() -> None:
    inputs = StepInputs(
        {
            "rows": jnp.array([2, 0, 9, 1]),
            "from_device": jnp.array([True, False, False, True]),
            "samples": jnp.array([True, True, False, True]),
            "num_new": jnp.array([3, 5, 0, 3]),
            "params": jnp.zeros((4, 9), jnp.int32),
        }
    )
    drafts = jnp.array([[7, 8], [-1, -1], [-1, -1], [6, -1]])
    tokens = RowTokens(jnp.array([10, 4, 0, 5]), drafts, *[jnp.zeros(0)] * 3)
    lines = speculate.sample_lines(inputs, tokens, 3)
    assert lines.rows.tolist() == [2, 2, 2, 0, 0, 0, 9, 9, 9, 1, 1, 1]
    assert lines.position[:4].tolist() == [11, 12, 13, 9]
    assert lines.samples.tolist() == [True] * 3 + [True, False, False] + [False] * 3 + [True, True, False]
    assert lines.drafts[:3].tolist() == [[-1, -1], [7, -1], [7, 8]]  # drafts that count as output before each line
    assert (lines.drafts[3:9] == -1).all()


COMPILES_LINES = """
import jax, jax.numpy as jnp
from sgl_jax.runtime import speculate
from sgl_jax.runtime.layout import StepInputs

def lines(inputs):
    numbers = inputs[:8]
    fields = {"from_device": inputs[8:16] != 0, "samples": inputs[16:24] != 0, "rows": numbers, "num_new": numbers, "params": numbers[:, None]}
    tokens = speculate.RowTokens(numbers, numbers[:, None].repeat(7, 1), numbers, numbers, numbers)
    return speculate.sample_lines(StepInputs(fields), tokens, 8).samples

jax.jit(lines).lower(jax.ShapeDtypeStruct((24,), jnp.int32)).compile()
"""


def test_eight_lines_a_row_compile_for_avx2() -> None:
    """LLVM's code generator for AVX2 does not end for one way to write them."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    subprocess.run([sys.executable, "-c", COMPILES_LINES], env=os.environ | flags, check=True, timeout=100)
