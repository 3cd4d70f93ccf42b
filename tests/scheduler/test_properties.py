"""Whatever arrives, whenever: every request is answered with the tokens computed by hand, and every page comes back.

The engine core runs over a fake device whose tokens depend on every page of a sequence, so that a page that is wrong,
stale or shared by mistake shows as a wrong token.
"""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
from hypothesis import given, settings

from sgl_jax.engine.messages import Abort, FlushCache
from simulated import Client, make_core

VOCAB = 17  # small: outputs repeat, share prefixes, and meet stop tokens
STEMS = [[1, 2, 3, 4] * 6, [1, 2, 3, 4, 1, 2, 9, 9] * 3]


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    namespace: str
    params: dict
    abort_at: int | None


@dataclasses.dataclass(frozen=True)
class Scenario:
    core: dict
    arrivals: list[Arrival]
    flushes: list[int]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    page_size = draw(st.sampled_from([1, 4, 16]))
    rows = draw(st.integers(1, 5))
    context_length = draw(st.integers(12, 40))
    smallest = -(-context_length // page_size)
    core = {
        "page_size": page_size,
        "rows": rows,
        "context_length": context_length,
        # One request always fits; more do, or push each other out.
        "num_usable_pages": smallest + draw(st.integers(0, smallest)),
        "step_tokens": draw(st.integers(rows, 24)),
        "prefill_tokens": draw(st.integers(1, 24)),
        "policy": draw(st.sampled_from(["fcfs", "lpm"])),
        "radix": draw(st.booleans()),
        "overlap": draw(st.booleans()),
    }
    steps = st.integers(0, 20)
    arrivals = draw(st.lists(arrival(context_length, steps), min_size=2, max_size=9))
    return Scenario(core, arrivals, draw(st.lists(steps, max_size=2)))


@st.composite
def arrival(draw: st.DrawFn, context_length: int, steps: st.SearchStrategy[int]) -> Arrival:
    stem = draw(st.sampled_from(STEMS))[: draw(st.sampled_from([0, 3, 8, 16, 17, 24]))]
    prompt = (stem + draw(st.lists(st.sampled_from([1, 2, 11]), min_size=1, max_size=3)))[-(context_length - 1) :]
    max_tokens = draw(st.sampled_from([None, 1, 3, 10, 20]))
    params: dict = {
        "max_tokens": max_tokens,
        "temperature": draw(st.sampled_from([0.0, 0.7])),
        "seed": draw(st.none() | st.integers(0, 3)),
        "ignore_eos": draw(st.sampled_from([True, True, True, False])),
        "stop_token_ids": tuple(draw(st.sampled_from([[], [], [], [6], [8, 3]]))),
        "min_tokens": draw(st.sampled_from([0, 0, 3])) if max_tokens is None or max_tokens >= 3 else 0,
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "logprobs": draw(st.sampled_from([None, None, 0, 2])),
        "prompt_logprobs": draw(st.sampled_from([None, None, None, 1])),
    }
    at = draw(st.just(0) | steps)
    abort_at = draw(st.none() | st.none() | st.integers(at, at + 12))
    return Arrival(at, prompt, draw(st.sampled_from(["", "", "adapter"])), params, abort_at)


def run(scenario: Scenario) -> Client:
    """Invariants are checked after each step, by the client."""
    core = make_core(vocab_size=VOCAB, eos=0, **scenario.core)
    client = Client(core)
    for step in range(1000):
        for key, each in enumerate(scenario.arrivals):
            if each.step == step:
                client.submit(key, each.prompt, namespace=each.namespace, **each.params)
            if each.abort_at == step:
                core.handle(Abort([key, 1000]))
        for call in range(scenario.flushes.count(step)):
            core.handle(FlushCache(call))
        if step > 40 and not core.busy:
            return client
        client.step()
    raise AssertionError("still busy after 1000 steps")


@settings(max_examples=700, derandomize=True, deadline=None, database=None, print_blob=True)
@given(scenarios())
def test_every_request_gets_its_tokens_and_every_page_comes_back(scenario: Scenario) -> None:
    client = run(scenario)
    for answer in client.answers.values():
        answer.check(VOCAB)
    assert len(client.flushed) == len(scenario.flushes)
    cache = client.core.scheduler.caches[0]
    assert cache.num_available_pages == cache.num_usable_pages
    cache.flush()
    assert cache.pool.num_free == cache.num_usable_pages
    counters = client.core.scheduler.counters
    assert counters.generated_tokens == sum(map(len, client.tokens.values()))


@settings(max_examples=60, derandomize=True, deadline=None, database=None, print_blob=True)
@given(scenarios())
def test_no_step_exceeds_its_budgets(scenario: Scenario) -> None:
    client = run(scenario)
    config = client.core.scheduler.config
    for plan in client.core._runner.plans:
        assert plan.num_tokens <= config.max_step_tokens
        assert len(plan.rows) <= config.max_running_requests
        assert plan.num_new[~plan.from_device].sum() <= config.max_prefill_tokens
        assert (
            plan.page_updates.shape[1] <= len(plan.rows) + plan.num_tokens // client.core.scheduler.caches[0].page_size
        )
