"""Tests of real checkpoints through the whole engine core. In float32 tokens equal those of Hugging Face transformers, for any
page size, chunk size, cache, overlap, pool size and other requests in the batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exact import GREEDY, Build, assert_top5

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.request import FinishReason
from sgl_jax.runtime import platform
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.scheduler.scheduler import Scheduler
from simulated import Answer, Client

CHUNK_OF_16 = Bucket(16, 16)


@pytest.fixture(scope="module")
def stories(build: Build, stories260k: Path) -> Core:
    """Start a core with pages of 16, chunks of 64 and room for 64 requests: four step programs."""
    return build(stories260k, page_size=16, chunked_prefill_size=64, max_running_requests=64)


def again(core: Core, *, radix: bool = True, overlap: bool = True, num_usable_pages: int | None = None) -> Core:
    """Make a core of the same programs and weights, with an empty cache and other settings."""
    cache = core.scheduler.caches[0]
    pages = num_usable_pages or cache.num_usable_pages
    scheduler = Scheduler(core.scheduler.config, [PrefixCache(pages + 1, cache.page_size, enabled=radix)])
    return Core(scheduler, core.runner, core.info, overlap=overlap, random_seed=0)


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    prompt: list[int]
    output: list[int]
    top5: list[list[tuple[int, float]]]


@pytest.fixture(scope="session")
def cases(golden: Path) -> list[Golden]:
    stored = json.loads((golden / "stories260k.json").read_text(encoding="utf-8"))["cases"]
    return [Golden(c["name"], c["prompt_ids"], c["output_ids_200_greedy"], c["top5_logprobs_first8"]) for c in stored]


def submit_golden(client: Client, cases: list[Golden]) -> dict[int, list[int]]:
    """Submit each prompt, and each with the first 120 tokens of its answer, long enough for several chunks. Return the right
    answers."""
    right: dict[int, list[int]] = {}
    for case in cases:
        for known in (0, 120):
            key = len(right)
            right[key] = case.output[known:]
            client.submit(key, case.prompt + case.output[:known], max_tokens=200 - known, **GREEDY)
    return right


def assert_golden(core: Core, cases: list[Golden]) -> Client:
    client = Client(core)
    right = submit_golden(client, cases)
    client.run(max_steps=5000)
    assert {key: client.tokens[key] for key in right} == right
    cache = core.scheduler.caches[0]
    assert cache.num_available_pages == cache.num_usable_pages
    return client


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("radix", [True, False])
def test_tokens_are_golden_with_radix_and_overlap_on_and_off(
    stories: Core, cases: list[Golden], radix: bool, overlap: bool
) -> None:
    core = again(stories, radix=radix, overlap=overlap)
    first = assert_golden(core, cases)
    assert first.stats[-1].preemptions == 0
    cached = first.stats[-1].cached_tokens
    second = assert_golden(core, cases)  # every prompt is in the cache now, if it is enabled
    assert (second.stats[-1].cached_tokens > cached) == radix


@pytest.mark.supports("layers scanned, as on a GPU", ["llama"])
def test_tokens_are_golden_in_the_form_accelerators_get(
    build: Build, stories260k: Path, cases: list[Golden], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are stacked and scanned, and decoding rows computed side by side."""
    form = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=True, vectorises_rows=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", form)
    assert_golden(build(stories260k, bucket=CHUNK_OF_16, page_size=16), cases)


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "scan"])
def test_tokens_are_golden_through_experts(
    build: Build, checkpoint: Callable[[str], Path], cases: list[Golden], monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """Each expert of this checkpoint is the dense MLP with its neurons in another order: any routing is right, any wrong
    dispatch is not."""
    form = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=stacked, vectorises_rows=stacked)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", form)
    model = checkpoint("stories260k-qwen2moe")
    assert_golden(build(model, bucket=CHUNK_OF_16, page_size=16), cases)


def test_tokens_are_golden_with_the_flags_that_switch_radix_and_overlap_off(
    build: Build, stories260k: Path, cases: list[Golden]
) -> None:
    core = build(
        stories260k,
        page_size=16,
        chunked_prefill_size=64,
        max_running_requests=64,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
    )
    assert not core.scheduler.caches[0].enabled
    assert not core._overlap
    assert_golden(core, cases)


@pytest.mark.parametrize("page_size", [1, 128])
def test_tokens_are_golden_with_other_page_sizes(
    build: Build, stories260k: Path, cases: list[Golden], page_size: int
) -> None:
    core = build(stories260k, bucket=CHUNK_OF_16, page_size=page_size)
    assert_golden(core, cases)
    assert_golden(again(core, radix=False, overlap=False), cases)


def test_tokens_are_golden_with_whole_prompts(build: Build, stories260k: Path, cases: list[Golden]) -> None:
    limits = {"chunked_prefill_size": -1, "max_running_requests": 8, "context_length": 256}
    core = build(stories260k, optimised=False, page_size=16, **limits)
    assert core.scheduler.config.max_step_tokens == 256
    assert_golden(core, cases)


def test_tokens_are_golden_in_chunks_of_16_from_a_pool_that_preempts(
    build: Build, stories260k: Path, cases: list[Golden]
) -> None:
    core = build(
        stories260k,
        bucket=CHUNK_OF_16,
        page_size=16,
        max_total_tokens=512,
        context_length=256,
    )
    assert assert_golden(core, cases).stats[-1].preemptions > 0
    for radix, overlap in ((True, False), (False, True), (False, False)):
        client = assert_golden(again(core, radix=radix, overlap=overlap, num_usable_pages=20), cases)
        assert client.stats[-1].preemptions > 0


def test_tokens_are_golden_alone(stories: Core, cases: list[Golden]) -> None:
    core = again(stories)
    for case in cases:
        client = Client(core)
        client.submit(1, case.prompt, max_tokens=200, **GREEDY)
        client.run()
        assert client.tokens[1] == case.output


EVERY_PARAMETER: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 200},
    {"top_p": 0.5},
    {"min_p": 0.2},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.5, "temperature": 0.0},
    {"repetition_penalty": 1.3},
    {"logit_bias": {7: 3.0, 9: -100.0}},
    {"seed": 11},
    {"min_tokens": 5, "stop_token_ids": (403, 410)},
    {"ignore_eos": True},
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 0.0},
    {"prompt_logprobs": 3},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "logprobs": 2},
]


def submit_others(client: Client, cases: list[Golden], rng: np.random.Generator, step: int, count: int) -> None:
    """Make requests of every kind, some of which begin like the golden ones."""
    for i in range(count):
        start = cases[i % 3].prompt[: int(rng.integers(0, 16))]
        prompt = [*start, *rng.integers(3, 512, int(rng.integers(1, 90))).tolist()]
        params = {"max_tokens": int(rng.integers(5, 60))} | EVERY_PARAMETER[i % len(EVERY_PARAMETER)]
        client.submit(1000 + 100 * step + i, prompt, **params)


@pytest.mark.parametrize("num_usable_pages", [None, 40])
def test_tokens_are_golden_among_32_others_and_nothing_compiles(
    stories: Core, cases: list[Golden], num_usable_pages: int | None
) -> None:
    """The other requests have every parameter, come in four waves, and preempt each other in a small pool."""
    core = again(stories, num_usable_pages=num_usable_pages)
    compiled = core.runner.compiles_after_ready
    client = Client(core)
    rng = np.random.default_rng(3)
    submit_others(client, cases, rng, 0, 8)
    right = submit_golden(client, cases)
    for wave in (1, 2, 3):
        for _ in range(10):
            client.step()
        submit_others(client, cases, rng, wave, 8)
    client.run(max_steps=5000)
    assert {key: client.tokens[key] for key in right} == right
    assert all(answer.reason is not None for answer in client.answers.values())
    assert (client.stats[-1].preemptions > 0) == (num_usable_pages is not None)
    assert core.runner.compiles_after_ready == compiled


def test_nothing_compiles_after_ready(build: Build, stories260k: Path, cases: list[Golden]) -> None:
    """Compilations are counted from the end of the start, on a core that has served nothing yet."""
    core = build(stories260k, page_size=16, chunked_prefill_size=64, max_running_requests=64)
    client = Client(core)
    for i, params in enumerate(EVERY_PARAMETER):
        client.submit(i, cases[i % 3].prompt, max_tokens=8, **params)
    client.run()
    assert client.stats[-1].compiles_after_ready == 0


# --- each parameter, end to end ---------------------------------------------------------------------------------------


def answer(core: Core, prompt: list[int], **params) -> Answer:
    client = Client(again(core))
    client.submit(1, prompt, **({"max_tokens": 40, "ignore_eos": True} | params))
    client.run()
    return client.answers[1]


def outputs(core: Core, prompt: list[int], **params) -> list[int]:
    return answer(core, prompt, **params).tokens


@pytest.fixture
def story(cases: list[Golden]) -> Golden:
    return cases[1]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_choice_is_greedy(stories: Core, story: Golden, params: dict) -> None:
    assert outputs(stories, story.prompt, seed=1, **params) == story.output[:40]


def test_temperature_spreads_the_choice(stories: Core, story: Golden) -> None:
    distinct = [
        len(set(outputs(stories, story.prompt, seed=5, temperature=t, max_tokens=100))) for t in (0.0, 1.0, 50.0)
    ]
    assert distinct[0] < distinct[1] < distinct[2]


@pytest.mark.parametrize("k", [2, 5])
def test_top_k_keeps_the_k_best(stories: Core, story: Golden, k: int) -> None:
    got = answer(stories, story.prompt, temperature=20.0, top_k=k, logprobs=20, seed=3, max_tokens=100)
    ranks = [scored.top_ids.index(token) for token, scored in zip(got.tokens, got.logprobs, strict=True)]
    assert set(ranks) == set(range(k))


def test_top_p_keeps_the_nucleus(stories: Core, story: Golden) -> None:
    got = answer(stories, story.prompt, top_p=0.6, logprobs=20, seed=3, max_tokens=200)
    ranks = []
    for token, scored in zip(got.tokens, got.logprobs, strict=True):
        rank = scored.top_ids.index(token)
        assert np.exp(scored.top_logprobs[:rank]).sum() < 0.6 + 1e-4
        ranks.append(rank)
    assert max(ranks) > 0


def test_min_p_keeps_what_is_likely_enough_beside_the_best(stories: Core, story: Golden) -> None:
    got = answer(stories, story.prompt, min_p=0.3, logprobs=20, seed=3, max_tokens=200)
    ratios = [np.exp(s.logprob - s.top_logprobs[0]) for s in got.logprobs]
    assert min(ratios) >= 0.3 - 1e-4
    assert min(ratios) < 1


@pytest.mark.parametrize(
    ("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 0.0), (0.0, -0.3), (0.5, 0.5)], ids=str
)
def test_presence_and_frequency_penalties_move_logits_by_the_output_so_far(
    stories: Core, story: Golden, presence: float, frequency: float
) -> None:
    """Each greedy token is the best one after penalties, which are computed here from the raw logprobs."""
    params = {"presence_penalty": presence, "frequency_penalty": frequency, "temperature": 0.0}
    got = answer(stories, story.prompt, **params, logprobs=20, max_tokens=60)

    def moved(token: int, so_far: list[int]) -> float:
        return -frequency * so_far.count(token) - presence * (token in so_far)

    num_decided = 0
    for i, scored in enumerate(got.logprobs):
        so_far = got.tokens[:i]
        after = {t: lp + moved(t, so_far) for t, lp in zip(scored.top_ids, scored.top_logprobs, strict=True)}
        best, second = sorted(after, key=lambda token: -after[token])[:2]
        unseen = scored.top_logprobs[-1] + max(
            [0.0, *(moved(t, so_far) for t in so_far)]
        )  # the best of all other tokens
        if after[best] > max(unseen, after[second]) + 1e-4:
            assert got.tokens[i] == best
            num_decided += 1
    assert num_decided > 40
    assert got.tokens != story.output[:60]


def test_repetition_penalty_avoids_what_occurred_in_prompt_or_output(stories: Core, story: Golden) -> None:
    plain, penalised = (
        outputs(stories, story.prompt, temperature=0.0, repetition_penalty=p, max_tokens=100) for p in (1.0, 1e6)
    )
    assert plain == story.output[:100]
    # With this penalty a token comes only once, as long as another has a positive logit.
    assert len(set(penalised)) > 1.5 * len(set(plain))
    assert not set(penalised[:20]) & set(story.prompt)


def test_logit_bias_forces_and_forbids(stories: Core, story: Golden) -> None:
    assert outputs(stories, story.prompt, logit_bias={77: 100.0}, temperature=0.0) == [77] * 40
    common = max(set(story.output[:40]), key=story.output[:40].count)
    assert common not in outputs(stories, story.prompt, logit_bias={common: -100.0}, temperature=0.0)


def test_stop_token_ids_end_the_answer_and_are_its_last_token(stories: Core, story: Golden) -> None:
    stop = story.output[6]
    at = story.output.index(stop)
    got = answer(stories, story.prompt, stop_token_ids=(stop, 511), temperature=0.0)
    assert got.tokens == story.output[: at + 1]
    assert got.reason == FinishReason("stop", stop)


def test_eos_ends_the_answer_unless_ignored(stories: Core, story: Golden) -> None:
    (eos,) = stories.info.eos_token_ids
    forced = {"logit_bias": {eos: 100.0}, "temperature": 0.0}
    got = answer(stories, story.prompt, ignore_eos=False, **forced)
    assert (got.tokens, got.reason) == ([eos], FinishReason("stop", eos))
    got = answer(stories, story.prompt, ignore_eos=True, **forced)
    assert (got.tokens, got.reason) == ([eos] * 40, FinishReason("length"))


def test_min_tokens_holds_stop_tokens_back(stories: Core, story: Golden) -> None:
    (eos,) = stories.info.eos_token_ids
    got = answer(
        stories, story.prompt, logit_bias={eos: 100.0}, min_tokens=7, ignore_eos=False, temperature=0.0, max_tokens=20
    )
    assert got.tokens == [*story.output[:7], eos]


def test_max_tokens_ends_the_answer(stories: Core, story: Golden) -> None:
    got = answer(stories, story.prompt, max_tokens=13, temperature=0.0)
    assert got.tokens == story.output[:13]
    assert got.reason == FinishReason("length")


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(stories: Core, cases: list[Golden]) -> None:
    story = cases[1]
    alone = outputs(stories, story.prompt, seed=9, max_tokens=60)
    client = Client(again(stories, num_usable_pages=60))
    submit_others(client, cases, np.random.default_rng(8), 0, 20)
    for _ in range(4):
        client.step()
    client.submit(1, story.prompt, seed=9, max_tokens=60, ignore_eos=True)
    client.submit(2, story.prompt, seed=10, max_tokens=60, ignore_eos=True)
    submit_others(client, cases, np.random.default_rng(9), 1, 20)
    client.run(max_steps=5000)
    assert client.tokens[1] == alone
    assert client.tokens[2] != alone


def test_requests_without_a_seed_differ(stories: Core, story: Golden) -> None:
    client = Client(again(stories))
    for key in range(4):
        client.submit(key, story.prompt, max_tokens=30, ignore_eos=True)
    client.run()
    assert len({tuple(tokens) for tokens in client.tokens.values()}) == 4


def test_logprobs_are_golden_and_raw_whatever_the_sampling(stories: Core, cases: list[Golden]) -> None:
    for case in cases:
        got = answer(stories, case.prompt, logprobs=5, temperature=0.0, max_tokens=8)
        assert len(got.logprobs) == 8
        assert_top5(got.logprobs, case.top5)
        for token, scored in zip(got.tokens, got.logprobs, strict=True):
            assert scored.logprob == scored.top_logprobs[scored.top_ids.index(token)]
        adjusted = answer(
            stories,
            case.prompt,
            logprobs=5,
            temperature=3.0,
            top_k=40,
            presence_penalty=1.0,
            logit_bias={9: 5.0},
            max_tokens=1,
        )
        assert_top5(adjusted.logprobs, case.top5[:1])


def test_a_prompt_that_fills_the_context_is_scored_in_a_pool_of_just_its_size(
    stories: Core, cases: list[Golden]
) -> None:
    """The scores of the tokens after the prompt are those of generating them; nothing is generated, before or after."""
    core = again(stories, num_usable_pages=stories.info.context_length // 16)
    client = Client(core)
    for key, case in enumerate(cases):
        full = ((case.prompt + case.output) * 3)[: stories.info.context_length]
        client.submit(2 * key, full, max_tokens=0, prompt_logprobs=5)
        client.submit(2 * key + 1, case.prompt, max_tokens=4, **GREEDY)
    client.run()
    for key, case in enumerate(cases):
        scored, generated = client.answers[2 * key], client.answers[2 * key + 1]
        assert (scored.tokens, scored.reason) == ([], FinishReason("length"))
        assert len(scored.prompt.logprobs) == stories.info.context_length
        assert_top5(scored.prompt.logprobs[len(case.prompt) :][:8], case.top5)
        assert generated.tokens == case.output[:4]
