"""Tests of the sampler against plain numpy: the tokens it can return, their frequencies, and the independence of rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fakes.fake_grammars import packed
from sgl_jax.parallel.grid import ONE_DEVICE
from sgl_jax.request import MAX_LOGPROBS, Request, SamplingParams
from sgl_jax.runtime import sampler
from sgl_jax.runtime.device_state import DeviceState, StateSizes, initial_state
from sgl_jax.runtime.loads import LOADS, LoadLayout
from sgl_jax.runtime.sampler import SampleLines
from sgl_jax.scheduler.rows import encode_params
from sgl_jax.step_plan import Param, RowLoad

NUM_DRAWS = 2048  # rows in a batch: enough for a distribution, with one compilation for each vocabulary size

_sample = jax.jit(sampler.sample)
_threshold = jax.jit(sampler._threshold)
_bisect_threshold = jax.jit(sampler._bisect_threshold)
_invert = jax.jit(sampler._invert)
_adjust = jax.jit(sampler._adjust)


@dataclasses.dataclass
class Row:
    """Row of a step: its parameters and the tokens before the sampled one."""

    params: SamplingParams
    prompt: list[int] = dataclasses.field(default_factory=lambda: [0])
    output: list[int] = dataclasses.field(default_factory=list)
    seed: int = 0
    stop: tuple[int, ...] = ()
    allowed: tuple[int, ...] = ()  # by the row's grammar, if it has one

    @property
    def request(self) -> Request:
        request = Request(
            key=0,
            prompt=np.array(self.prompt, np.int32),
            params=self.params,
            namespace="",
            seed=self.seed,
            max_total_tokens=2**20,
            stop_token_ids=np.array(self.stop, np.int32),
            arrival=0,
        )
        request.tokens = np.array([*self.prompt, *self.output], np.int32)
        return request


def step_of(rows: list[Row], vocab_size: int, num_rows: int) -> tuple[SampleLines, DeviceState]:
    """Return lines and device state of a step that samples each row's next token, padded to num_rows."""
    n = len(rows)
    params = np.zeros((num_rows, len(Param)), np.int32)
    params[:n] = [encode_params(r.request) for r in rows]
    position = np.zeros(num_rows, np.int32)
    position[:n] = [len(r.prompt) + len(r.output) for r in rows]
    lines = SampleLines(
        rows=jnp.where(jnp.arange(num_rows) < n, jnp.arange(num_rows), num_rows),
        position=jnp.asarray(position),
        samples=jnp.arange(num_rows) < n,
        params=jnp.asarray(params),
        drafts=jnp.zeros((num_rows, 0), jnp.int32),
    )
    sizes = StateSizes(num_rows, 1, vocab_size, num_tokens=64, takes_grammars=True)
    state = initial_state(sizes)
    masks = [
        packed([token for token in row.allowed if token < vocab_size], vocab_size) if row.params.grammar else None
        for row in rows
    ]
    loads = [RowLoad(i, None, row.request, mask) for i, (row, mask) in enumerate(zip(rows, masks, strict=True))]
    for kind in LOADS:
        layout = LoadLayout(kind, num_rows, kind.size(sizes))
        for vector in layout.pack(loads):
            state = layout.run(state, jnp.asarray(vector), axis=ONE_DEVICE)
    return lines, state


def sample(logits: np.ndarray, rows: list[Row], num_rows: int | None = None) -> list[int]:
    """Sample from logits [n, V]; padding rows get other logits."""
    num_rows = num_rows or len(rows)
    padded = np.full((num_rows, logits.shape[1]), 7.0, np.float32)
    padded[: len(rows)] = logits
    lines, state = step_of(rows, logits.shape[1], num_rows)
    return np.asarray(_sample(padded, lines, state))[: len(rows)].tolist()


@functools.cache
def many_rows(vocab_size: int) -> tuple[SampleLines, DeviceState]:
    return step_of([Row(SamplingParams())] * NUM_DRAWS, vocab_size, NUM_DRAWS)


def draws(logits: np.ndarray, **params) -> np.ndarray:
    """Count each token in NUM_DRAWS rows that differ only in their seeds, sampled in one call."""
    lines, state = many_rows(len(logits))
    columns = np.tile(encode_params(Row(SamplingParams(**params)).request), (NUM_DRAWS, 1))
    columns[:, Param.SEED] = np.arange(NUM_DRAWS)
    lines = dataclasses.replace(lines, params=jnp.asarray(columns))
    tokens = np.asarray(_sample(np.tile(logits, (NUM_DRAWS, 1)), lines, state))
    return np.bincount(tokens, minlength=len(logits))


def distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Compute the probabilities in float64 with a full sort, in Hugging Face's order of parameters."""
    x = logits.astype(np.float64) / temperature
    if 0 < top_k < len(x):
        x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


def assert_drawn_from(counts: np.ndarray, p: np.ndarray) -> None:
    """Test that no token has probability 0, and the frequencies by chi-squared with rare tokens counted together. Seeds are
    fixed, so the result does not change from run to run."""
    assert counts.sum() == NUM_DRAWS
    assert counts[p == 0].sum() == 0, f"impossible tokens {np.flatnonzero(counts * (p == 0))}"
    expected = p * NUM_DRAWS
    common = expected >= 8
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def peaked(vocab_size: int) -> np.ndarray:
    """Make logits of a few likely tokens, scattered over the vocabulary: the threshold is among the candidates."""
    rng = np.random.default_rng(vocab_size)
    return (rng.standard_normal(vocab_size) * 3).astype(np.float32)


def flat(vocab_size: int) -> np.ndarray:
    """Make nearly equal logits: the threshold is far below the candidates."""
    rng = np.random.default_rng(vocab_size)
    return (rng.standard_normal(vocab_size) * 0.3).astype(np.float32)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 65},
    {"top_k": 300},
    {"top_k": 5000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.99},
    {"min_p": 0.1},
    {"min_p": 0.9},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.7},
    {"top_k": 200, "min_p": 0.5},
    {"top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("make", "vocab_size"), [(peaked, 50), (peaked, 1000), (flat, 1000)])
def test_tokens_are_drawn_from_the_filtered_distribution(make, vocab_size: int, filters: dict) -> None:
    logits = make(vocab_size)
    assert_drawn_from(draws(logits, **filters), distribution(logits, **filters))


def thresholds(x: np.ndarray, filters: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the threshold of each row of scaled logits x with its filters: as the sampler finds it, and by bisection alone."""
    defaults = {"top_k": 2**31 - 1, "top_p": 1.0, "min_p": 0.0}
    dtypes = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    columns = tuple(np.array([f.get(name, defaults[name]) for f in filters], dtypes[name]) for name in defaults)
    found = _threshold(x, columns, np.ones(len(x), bool))
    return np.asarray(found), np.asarray(_bisect_threshold(x, columns))


@pytest.mark.parametrize("vocab_size", [50, 64, 65, 1000])
@pytest.mark.parametrize("make", [peaked, flat])
def test_the_kept_tokens_are_exactly_numpys_whatever_the_way(vocab_size: int, make) -> None:
    """Thresholds from the candidates and from bisection keep the same tokens as a full sort."""
    each = [f for f in FILTERS if f.keys() - {"temperature"} and f.get("top_k", 1) < vocab_size]
    filters = [{k: v for k, v in f.items() if k != "temperature"} for f in each]
    temperatures = np.array([f.get("temperature", 1.0) for f in each], np.float32)
    x = make(vocab_size) / temperatures[:, None]
    together, bisected = thresholds(x, filters)
    for i, row in enumerate(x):
        kept = distribution(row, **filters[i]) > 0
        alone, _ = thresholds(x[i : i + 1], filters[i : i + 1])
        np.testing.assert_array_equal(row >= together[i], kept, err_msg=str(filters[i]))
        np.testing.assert_array_equal(row >= bisected[i], kept, err_msg=str(filters[i]))
        assert alone == together[i]


def test_no_uniform_draws_a_token_without_weight() -> None:
    """With few tokens kept of many, rounding makes parallel prefix sums vary over blocks of tokens without weight."""
    vocab_size, kept, steps = 151_936, 50, 2**23  # a uniform float32 is a multiple of 2^-23
    for seed in range(2):
        x = np.random.default_rng(seed).normal(0, 2, vocab_size).astype(np.float32)
        x -= x.max()
        threshold = np.sort(x)[-kept]
        cumulative = np.cumsum(np.where(x >= threshold, np.exp(x.astype(np.float64)), 0))
        edges = np.round(cumulative[x >= threshold] / cumulative[-1] * steps)
        uniform = np.clip(np.concatenate([edges - 1, edges, edges + 1]), 0, steps - 1).astype(np.float32) / steps
        alike = np.broadcast_to(x, (len(uniform), vocab_size))
        tokens = _invert(alike, np.full(len(uniform), threshold), uniform)
        assert (x[np.asarray(tokens)] >= threshold).all()


@pytest.mark.parametrize("vocab_size", [20, 200])
@pytest.mark.parametrize("num_alike", [3, 100])
def test_tokens_tied_at_the_kth_place_are_all_kept_and_all_weigh(vocab_size: int, num_alike: int) -> None:
    """Tokens that tie with the k-th are kept, as in Hugging Face; top_p takes its mass from all that are kept."""
    logits = np.full(vocab_size, -5.0, np.float32)
    logits[0] = 1.0
    logits[1 : 1 + num_alike] = 0.0
    num_alike = min(num_alike, vocab_size - 1)
    # The first token has the mass e of e + num_alike, less than 0.7.
    assert np.e / (np.e + num_alike) < 0.7
    assert [t.tolist() for t in thresholds(logits[None], [{"top_k": 2, "top_p": 0.7}])] == [[0.0], [0.0]]


def test_top_k_drops_no_token_for_being_unlikely() -> None:
    logits = np.array([0.0, -30.0, -31.0, -32.0], np.float32)[None]
    assert [t.tolist() for t in thresholds(logits, [{"top_k": 3}])] == [[-31.0], [-31.0]]


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = np.array([[0, 3, 1, 3], [5, 1, 1, 1], [-9, -8, -7, -7]], np.float32)
    assert sample(logits, [Row(SamplingParams(temperature=0.0), seed=i) for i in range(3)]) == [1, 0, 2]


@pytest.mark.parametrize("vocab_size", [7, 300, 512, 49152])
def test_the_first_of_equals_is_greedys_for_every_size_of_vocabulary(vocab_size: int) -> None:
    logits = np.random.default_rng(0).integers(0, 3, (5, vocab_size)).astype(np.float32)
    logits[1], logits[2, -1] = -np.inf, 5
    found = jax.jit(lambda x: sampler.best_token(x, ONE_DEVICE))(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-44])
def test_a_temperature_near_nothing_is_greedy(temperature: float) -> None:
    logits = np.array([[20.0, 300.0, -50.0, 299.0]] * 64, np.float32)
    rows = [Row(SamplingParams(temperature=temperature), seed=i) for i in range(64)]
    assert set(sample(logits, rows)) == {1}


def test_a_high_temperature_makes_all_tokens_alike() -> None:
    assert_drawn_from(draws(peaked(50), temperature=1e6), np.full(50, 1 / 50))


def mixed_rows() -> list[Row]:
    """The parameters are tried alone and together."""
    rows = [
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_k": 500},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"temperature": 0.3, "top_k": 100, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "temperature": 0.0},
        {"frequency_penalty": -1.0, "top_k": 90},
        {"logit_bias": {5: 4.0, 6: -100.0}},
        {"min_tokens": 9, "temperature": 0.0},
        {"regex": "x", "top_k": 9, "frequency_penalty": 0.5},
    ]
    allowed = (*range(1, 40, 7), 33, *range(250, 1000, 249))  # on every shard
    return [
        Row(SamplingParams(**p), prompt=[1, 2, 3, i], output=[7, 7, 8][: i % 4], seed=i, stop=(9, 4), allowed=allowed)
        for i, p in enumerate(rows)
    ]


def test_a_rows_token_does_not_depend_on_the_others() -> None:
    rows = mixed_rows()
    for make in (peaked, flat):
        logits = np.stack([np.roll(make(1000), 13 * i) for i in range(len(rows))])
        together = sample(logits, rows, num_rows=16)
        backwards = sample(logits[::-1], rows[::-1], num_rows=16)[::-1]
        alone = [sample(logits[i : i + 1], [row], num_rows=16)[0] for i, row in enumerate(rows)]
        assert together == alone == backwards


@pytest.mark.parametrize("vocab_size", [40, 1000])
def test_rows_done_in_blocks_get_the_same_tokens(monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    rows = [dataclasses.replace(row, seed=i) for i, row in enumerate(mixed_rows() * 4)][:21]
    logits = np.random.default_rng(3).normal(0, 3, (len(rows), vocab_size)).astype(np.float32)
    lines, state = step_of(rows, vocab_size, len(rows))
    at_once = np.asarray(jax.jit(sampler.sample)(logits, lines, state))
    monkeypatch.setattr(sampler, "_LINES_BYTES", 8 * 4 * vocab_size)
    assert sampler.lines_at_once(vocab_size) == 8  # three blocks, of which the last computes three rows again
    np.testing.assert_array_equal(jax.jit(functools.partial(sampler.sample))(logits, lines, state), at_once)


def test_a_row_that_does_not_sample_changes_nothing() -> None:
    rows = mixed_rows()
    logits = np.stack([np.roll(flat(1000), 13 * i) for i in range(len(rows))])
    lines, state = step_of(rows, 1000, len(rows))
    expected = np.asarray(_sample(logits, lines, state))
    some = np.arange(len(rows)) % 2 == 0
    tokens = np.asarray(_sample(logits, dataclasses.replace(lines, samples=lines.samples & some), state))
    assert tokens[some].tolist() == expected[some].tolist()


def test_seed_and_position_decide_the_token() -> None:
    logits = flat(1000)[None]

    def at(seed: int, position: int) -> int:
        row = Row(SamplingParams(), prompt=[1] * position, seed=seed)
        return sample(logits, [row], num_rows=16)[0]

    assert at(5, 30) == at(5, 30)
    assert len({at(5, p) for p in range(1, 13)}) > 9
    assert len({at(s, 30) for s in range(12)}) > 9
    assert at(2**32 - 1, 30) != at(2**31 - 1, 30)
    # Repetition counts tokens of the prompt and of the output alike.
    row = Row(SamplingParams(), prompt=[1] * 20, output=[2] * 10, seed=5)
    assert sample(logits, [row], num_rows=16) == [at(5, 30)]


def adjusted(logits: np.ndarray, row: Row) -> np.ndarray:
    lines, state = step_of([row], len(logits), 1)
    return np.asarray(_adjust(logits[None], lines, state))[0]


LOGITS = np.array([2.0, -2.0, 1.0, -1.0, 0.5, 3.0], np.float32)
PAST = {"prompt": [0, 1, 1], "output": [1, 2, 2, 2]}


def test_repetition_penalty_divides_or_multiplies_once_what_occurs_in_prompt_or_output() -> None:
    row = Row(SamplingParams(repetition_penalty=2.0), **PAST)
    assert adjusted(LOGITS, row).tolist() == [1.0, -4.0, 0.5, -1.0, 0.5, 3.0]
    row = Row(SamplingParams(repetition_penalty=0.5), **PAST)
    assert adjusted(LOGITS, row).tolist() == [4.0, -1.0, 2.0, -1.0, 0.5, 3.0]


def test_presence_penalty_is_taken_once_from_what_occurs_in_the_output() -> None:
    row = Row(SamplingParams(presence_penalty=0.5), **PAST)
    assert adjusted(LOGITS, row).tolist() == [2.0, -2.5, 0.5, -1.0, 0.5, 3.0]


def test_frequency_penalty_is_taken_as_often_as_a_token_occurs_in_the_output() -> None:
    row = Row(SamplingParams(frequency_penalty=0.25), **PAST)
    assert adjusted(LOGITS, row).tolist() == [2.0, -2.25, 0.25, -1.0, 0.5, 3.0]
    row = Row(SamplingParams(frequency_penalty=-0.25, presence_penalty=1.0), **PAST)
    assert adjusted(LOGITS, row).tolist() == [2.0, -2.75, 0.75, -1.0, 0.5, 3.0]


def test_logit_bias_is_added_before_penalties() -> None:
    row = Row(SamplingParams(logit_bias={0: -4.0, 3: 2.5, 5: -100.0}, repetition_penalty=2.0), **PAST)
    assert adjusted(LOGITS, row).tolist() == [-4.0, -4.0, 0.5, 1.5, 0.5, -97.0]


def test_stop_tokens_are_held_back_until_min_tokens_are_out() -> None:
    params = SamplingParams(min_tokens=2, logit_bias={5: 1.0}, temperature=0.0)
    for output, best in (([], 0), ([4], 0), ([4, 4], 5), ([4, 4, 4], 5)):
        row = Row(params, prompt=[1, 1], output=output, stop=(5, 3))
        logits = adjusted(LOGITS, row)
        assert np.isneginf(logits).tolist() == [False, False, False, len(output) < 2, False, len(output) < 2]
        assert logits[[0, 1, 2, 4]].tolist() == LOGITS[[0, 1, 2, 4]].tolist()
        assert sample(LOGITS[None], [row]) == [best]


def test_held_back_tokens_are_never_drawn() -> None:
    logits = np.tile(np.array([9, 1, 1, 1, 1, 9], np.float32), (64, 1))
    rows = [Row(SamplingParams(min_tokens=1, top_k=4), seed=i, stop=(5, 0)) for i in range(64)]
    assert set(sample(logits, rows)) == {1, 2, 3, 4}


def test_only_tokens_of_the_mask_are_sampled() -> None:
    allowed = (3, 31, 32, 63, 64)
    logits = np.tile(np.linspace(4, 0, 65, dtype=np.float32), (64, 1))
    greedy = Row(SamplingParams(regex="x", temperature=0.0, presence_penalty=2.0), output=[3], allowed=allowed)
    assert sample(logits[:1], [greedy]) == [31]
    rows = [Row(SamplingParams(regex="x", temperature=9.0), seed=i, allowed=allowed) for i in range(64)]
    assert set(sample(logits, rows)) == set(allowed)


def test_a_mask_outweighs_what_holds_its_tokens_back() -> None:
    params = {"regex": "x", "min_tokens": 4, "logit_bias": {1: -100.0}}
    for temperature in (0.0, 1.0):
        row = Row(SamplingParams(temperature=temperature, **params), stop=(5,), allowed=(5,))
        assert sample(LOGITS[None], [row]) == [5]
        row = Row(SamplingParams(temperature=temperature, **params), stop=(5,), allowed=(1, 5))
        assert sample(LOGITS[None], [row]) == [1]


def test_rows_without_flags_ignore_what_their_row_of_the_state_holds() -> None:
    logits = np.tile(LOGITS, (2, 1))
    lines, _ = step_of(
        [Row(SamplingParams(temperature=0.0)), Row(SamplingParams(temperature=0.0, logit_bias={1: 9}))], 6, 2
    )
    _, state = step_of([Row(SamplingParams(logit_bias={2: 50.0}, presence_penalty=2.0), output=[5])] * 2, 6, 2)
    assert np.asarray(_sample(logits, lines, state)).tolist() == [5, 2]


def test_logprobs_are_of_the_raw_distribution() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, 40)).astype(np.float32) * 4
    chosen = np.array([3, 0, 39], np.int32)
    got = sampler.token_logprobs(jnp.asarray(logits), jnp.asarray(chosen), jnp.bool_(True))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-expected, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(np.asarray(got.top_ids), order)
    np.testing.assert_allclose(np.asarray(got.chosen), expected[np.arange(3), chosen], atol=1e-5)
    np.testing.assert_allclose(np.asarray(got.top_logprobs), np.take_along_axis(expected, order, -1), atol=1e-5)


def test_logprobs_of_a_vocabulary_below_the_limit_are_padded() -> None:
    got = sampler.token_logprobs(jnp.asarray(LOGITS[None]), jnp.array([5]), jnp.bool_(True))
    assert np.asarray(got.top_ids)[0, :6].tolist() == [5, 0, 2, 4, 3, 1]
    assert np.isneginf(np.asarray(got.top_logprobs)[0, 6:]).all()


def test_logprobs_nobody_asked_for_are_zeros_of_the_same_shape() -> None:
    no = sampler.token_logprobs(jnp.asarray(LOGITS[None]), jnp.array([5]), jnp.bool_(False))
    yes = sampler.token_logprobs(jnp.asarray(LOGITS[None]), jnp.array([5]), jnp.bool_(True))
    assert [(x.shape, x.dtype) for x in no] == [(x.shape, x.dtype) for x in yes]
    assert not any(np.asarray(x).any() for x in no)
