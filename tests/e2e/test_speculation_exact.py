"""Speculation changes nothing: random requests with every parameter, aborted, preempted and cached, get the tokens of a plain
launch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from exact import GREEDY, Build

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Abort, TokenLogprobs
from sgl_jax.runtime import sampler
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.scheduler.scheduler import Scheduler
from simulated import Answer, Client

ROWS, TOKENS = 6, 48
CONTEXT = {"stories": 96, "eagle": 160}  # tokens
EAGLE = Path(__file__).parents[1] / "data" / "eagle" / "eagle3-qwen3"
SETTINGS = {  # drafter, W, page size
    "ngram": ("stories", {"speculative_algorithm": "NGRAM"}, 4, 16),
    "itself": ("stories", {"speculative_algorithm": "STANDALONE"}, 8, 1),
    "eagle3": ("eagle", {"speculative_algorithm": "EAGLE3"}, 2, 128),
}


ROUNDING = 1e-5  # in a cumulative probability, since products of other numbers of rows add up in another order

type Boundaries = dict[float, set[int]]  # the uniform numbers that drew a token near a boundary: all tokens that near


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: list[int]
    params: dict
    after: int  # steps before it comes
    aborted_at: int | None = None  # tokens


def start(build: Build, name: str, target: Path, page_size: int, **options) -> Core:
    return build(target, Bucket(TOKENS, ROWS), page_size=page_size, context_length=CONTEXT[name], **options)


@pytest.fixture(scope="module")
def targets(stories260k: Path) -> dict[str, tuple[Path, Path]]:
    """The model and the draft model that are used with it."""
    return {"stories": (stories260k, stories260k), "eagle": (EAGLE / "target", EAGLE / "draft")}


@pytest.fixture(scope="module")
def boundaries() -> Boundaries:
    return {}


@pytest.fixture(scope="module")
def plain(build: Build, targets: dict[str, tuple[Path, Path]], boundaries: Boundaries) -> dict[str, Core]:
    """Launches without speculation, which note where rounding may draw another token."""
    invert = sampler._invert

    def note(*arrays: jax.Array) -> None:
        x, threshold, uniform = map(np.asarray, arrays)
        weights = np.where(x >= threshold[:, None], np.exp(np.float64(x)), 0)
        ends = np.cumsum(weights, 1) / weights.sum(1, keepdims=True)
        begins = np.pad(ends[:, :-1], ((0, 0), (1, 0)))
        u = uniform[:, None]
        near = (weights > 0) & (begins < u + ROUNDING) & (ends > u - ROUNDING)
        for line in np.flatnonzero(near.sum(1) > 1):
            boundaries.setdefault(float(uniform[line]), set()).update(np.flatnonzero(near[line]).tolist())

    def noted(x, threshold, uniform, axis):
        jax.debug.callback(note, x, threshold, uniform)
        return invert(x, threshold, uniform, axis)

    drawn(np.uint32(0), np.int32(0))  # compiles before launches count what they compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_invert", noted)
        return {name: start(build, name, target, 16) for name, (target, _) in targets.items()}


@pytest.fixture(scope="module", params=SETTINGS)
def drafting(request: pytest.FixtureRequest, build: Build, targets: dict[str, tuple[Path, Path]]) -> tuple[str, Core]:
    name, options, width, page_size = SETTINGS[request.param]
    target, draft = targets[name]
    path = {} if request.param == "ngram" else {"speculative_draft_model_path": str(draft)}
    sizes = {"speculative_num_draft_tokens": width, "speculative_disable_by_batch_size": 3}
    return name, start(build, name, target, page_size, **options, **path, **sizes)


def again(core: Core, *, overlap: bool = True, radix: bool = True, tiny: bool = False, chunk: int = TOKENS) -> Core:
    """Make a core of the same programs with an empty cache; `tiny`: with a page more than one request of the
    greatest length needs."""
    assert isinstance(core.runner, ModelRunner)
    (cache,), config = core.scheduler.caches, core.scheduler.config
    config = dataclasses.replace(config, max_prefill_tokens=chunk)
    pages = core.runner.config.pages_per_row + 1 if tiny else cache.num_usable_pages
    scheduler = Scheduler(config, [PrefixCache(pages + 1, cache.page_size, enabled=radix)])
    return Core(scheduler, core.runner, core.info, overlap=overlap, random_seed=0)


def some_requests(rng: np.random.Generator, stems: Sequence[list[int]], eos: int, context: int) -> list[Ask]:
    asks = []
    while len(asks) < 12:
        prompt = list(stems[rng.integers(len(stems))])[: int(rng.integers(1, context - 8))]
        if rng.random() < 0.5:
            prompt += rng.integers(3, 512, int(rng.integers(1, 6))).tolist()
        room = context - len(prompt)
        params = {"max_tokens": room if rng.random() < 0.3 else int(rng.integers(1, min(40, room + 1)))}
        params |= some_params(rng, eos)
        after, num_choices = int(rng.integers(0, 12)), 1 if rng.random() < 0.8 else 3
        for choice in range(num_choices):  # choices of n are requests of their own
            seed = {"seed": params["seed"] + choice} if "seed" in params else {}
            aborted = int(rng.integers(0, 20)) if rng.random() < 0.15 else None
            asks.append(Ask(prompt, params | seed, after, aborted))
    return asks


def some_params(rng: np.random.Generator, eos: int) -> dict:
    choices: list[tuple[float, dict]] = [
        (0.5, {"temperature": 0.0}),
        (0.5, {"seed": int(rng.integers(-99, 99))}),
        (0.3, {"temperature": float(rng.uniform(0.2, 1.5)), "top_k": int(rng.integers(1, 60)), "top_p": 0.9}),
        (0.1, {"min_p": 0.05}),
        (0.2, {"frequency_penalty": float(rng.uniform(-0.5, 1))}),
        (0.2, {"presence_penalty": float(rng.uniform(-1, 1))}),
        (0.2, {"repetition_penalty": float(rng.uniform(0.8, 1.4))}),
        (0.3, {"logit_bias": {int(t): float(rng.uniform(-5, 7)) for t in (*rng.integers(3, 512, 3), eos)}}),
        (0.3, {"min_tokens": int(rng.integers(1, 20))}),
        (0.3, {"stop_token_ids": tuple(int(t) for t in rng.integers(3, 512, 9))}),
        (0.5, {"ignore_eos": True}),
        (0.4, {"logprobs": int(rng.integers(0, 4))}),
        (0.2, {"prompt_logprobs": int(rng.integers(0, 3))}),
        (0.2, {"disable_speculation": True}),
    ]
    params = {}
    for chance, found in choices:
        if rng.random() < chance:
            params |= found
    return params


def answered(core: Core, asks: Sequence[Ask], *, aborts: bool) -> Client:
    """Answer the requests, with the scheduler's invariants checked after each step."""
    client, steps = Client(core), 0
    waiting = sorted(range(len(asks)), key=lambda key: asks[key].after)
    while waiting or core.busy:
        while waiting and (asks[waiting[0]].after <= steps or not core.busy):
            client.submit(key := waiting.pop(0), asks[key].prompt, **asks[key].params)
        client.step()
        for key, answer in client.answers.items():
            limit = asks[key].aborted_at
            if aborts and limit is not None and answer.reason is None and len(answer.tokens) >= limit:
                core.handle(Abort([key]))
        steps += 1
        assert steps < 2000
    (cache,) = core.scheduler.caches
    assert cache.num_available_pages == cache.num_usable_pages
    return client


@jax.jit
def drawn(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))


def is_rounded(answer: Answer, right: Answer, boundaries: Boundaries) -> bool:
    """Whether the first token in which the answers differ was drawn so near to a boundary that either is right."""
    pairs = enumerate(zip(answer.tokens, right.tokens, strict=False), start=len(right.request.prompt))
    found = next(((position, pair) for position, pair in pairs if pair[0] != pair[1]), None)
    if found is None or right.request.params.temperature == 0:
        return False
    uniform = float(drawn(np.uint32(right.request.seed), np.int32(found[0])))
    return boundaries.get(uniform, set()).issuperset(found[1])


def assert_same(client: Client, expected: Client, boundaries: Boundaries) -> int:
    """Answers are equal; aborted ones are the beginning. Return how many are not, for rounding."""
    num_rounded = 0
    for key, right in expected.answers.items():
        answer, params = client.answers[key], right.request.params
        assert answer.reason is not None
        if is_rounded(answer, right, boundaries):
            num_rounded += 1
            continue
        if answer.reason.type == "abort":
            n = len(answer.tokens)
            right = dataclasses.replace(
                right, tokens=right.tokens[:n], logprobs=right.logprobs[:n], reason=answer.reason
            )
        assert (answer.tokens, answer.reason) == (right.tokens, right.reason), params
        assert_close(answer.logprobs, right.logprobs)
        if answer.prompt is not None and right.prompt is not None:
            assert_close(answer.prompt.logprobs or [], right.prompt.logprobs or [])
    return num_rounded


def assert_close(ours: Sequence[TokenLogprobs | None], theirs: Sequence[TokenLogprobs | None]) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None and their is not None:
            np.testing.assert_allclose(
                [our.logprob, *our.top_logprobs], [their.logprob, *their.top_logprobs], atol=1e-4
            )


WAYS = [
    {},
    {"overlap": False},
    {"tiny": True, "chunk": 7},
    {"tiny": True, "overlap": False, "radix": False},
    {"radix": False, "chunk": 1},
]


@pytest.mark.timeout(300)
def test_random_requests_get_the_tokens_of_a_plain_launch(
    plain: dict[str, Core], drafting: tuple[str, Core], boundaries: Boundaries
) -> None:
    name, core = drafting
    (eos,), preemptions, accepted, cached, num_rounded = core.info.eos_token_ids, 0, 0, 0, 0
    trained_on = [case["prompt_ids"] for case in json.loads((EAGLE / "oracle.json").read_text())["cases"]]
    stems = [[1, 403, 407, 261, 378] * 40, *([] if name == "stories" else trained_on)]
    for number, way in enumerate(WAYS):
        rng = np.random.default_rng(number)
        ours, theirs = again(core, **way), again(plain[name])
        known = list(stems)
        for _ in range(2):  # the second requests continue answers to the first
            asks = some_requests(rng, known, eos, CONTEXT[name])
            expected = answered(theirs, asks, aborts=False)
            known += [[*answer.request.prompt.tolist(), *answer.tokens] for answer in expected.answers.values()]
            client = answered(ours, asks, aborts=True)
            num_rounded += assert_same(client, expected, boundaries)
        preemptions += ours.scheduler.counters.preemptions
        cached += ours.scheduler.counters.cached_tokens
        accepted += ours.scheduler.counters.accepted_drafts
    assert core.runner.compiles_after_ready == 0
    assert preemptions > 0
    assert cached > 0
    assert accepted > 0
    assert num_rounded <= 1  # in more than 120 answers


def test_a_steady_step_is_one_dispatch_and_one_copy(
    drafting: tuple[str, Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program takes one vector from the host; all else is on the device already."""
    core = again(drafting[1])
    runner, programs = core.runner, []
    assert isinstance(runner, ModelRunner)
    monkeypatch.setattr(runner, "_announce", lambda program, *_: programs.append(program))
    client = Client(core)
    for key in range(3):
        client.submit(key, [300 + key, 5], max_tokens=40, **GREEDY)
    client.step()
    programs.clear()
    before = core.scheduler.counters.steps
    client.run()
    width = core.scheduler.config.width
    assert set(programs) <= {f"tokens={TOKENS} rows={ROWS}", f"tokens={TOKENS} rows={ROWS} width={width}"}
    assert len(programs) == core.scheduler.counters.steps - before > 0
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(runner._values))
    assert runner.compiles_after_ready == 0


@pytest.mark.parametrize("drafting", ["itself"], indirect=True)
@pytest.mark.parametrize("page", ["empty cache", "cached prefix"])
def test_a_model_that_drafts_for_itself_is_always_right(drafting: tuple[str, Core], page: str) -> None:
    """Each step after the prompts' gives every row W tokens."""
    core, rounds = again(drafting[1], overlap=False), 5
    width, asks = core.scheduler.config.width, [([1, 403, 407, 261, 378] * 3, 0), ([300, 5], 1), ([7] * 20, 2)]
    client = Client(core)
    if page == "cached prefix":
        for prompt, key in asks:
            client.submit(100 + key, prompt, max_tokens=1)
        client.run()
    before = core.scheduler.counters.steps
    for prompt, key in asks:
        client.submit(key, [*prompt, 9], max_tokens=1 + rounds * width, **GREEDY)
    client.run()
    assert core.scheduler.counters.steps - before == 1 + rounds
    assert [len(client.tokens[key]) for _, key in asks] == [1 + rounds * width] * 3
