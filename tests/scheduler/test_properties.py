"""Properties of the scheduler: every request gets the tokens computed by hand, and every page comes back.

The engine core runs over a fake device whose tokens depend on every page of a sequence, so that a page that is wrong,
stale or shared by mistake gives a wrong token. The properties hold for rows of any width: with drafts accepted and rejected,
output equals that of W = 1, which is computed by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fakes.fake_grammars import FakeGrammars
from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import Abort, FlushCache
from sgl_jax.scheduler.rank_order import PLACEMENTS
from sgl_jax.step_plan import pages_per_row
from simulated import Client, make_core

# W by the number of decoding rows: drafts for no row, for all rows, or only in small batches.
WIDTHS = {"1": lambda n: 1, "4": lambda n: 4, "4 to 1": lambda n: {1: 4, 2: 2}.get(n, 1)}
EXAMPLES = {"1": 1.0, "4": 0.6, "4 to 1": 0.4}  # fraction of a property's examples

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
def scenarios(draw: st.DrawFn, width: str = "1", ranks: tuple[int, ...] = (1,)) -> Scenario:
    page_size = draw(st.sampled_from([1, 4, 16]))
    rows = draw(st.integers(1, 5))
    context_length = draw(st.integers(12, 40))
    widths = [WIDTHS[width](n) for n in range(1, rows + 1)]
    lookahead = draw(st.sampled_from([0, max(widths) - 1]))
    smallest = pages_per_row(context_length, max(widths), page_size, lookahead)
    most_decoding = max(n * w for n, w in enumerate(widths, 1))
    core = {
        "width": WIDTHS[width],
        "lookahead": lookahead,
        "page_size": page_size,
        "rows": rows,
        "context_length": context_length,
        # One request always fits; several may preempt each other.
        "num_usable_pages": smallest + draw(st.integers(0, smallest)),
        "step_tokens": draw(st.integers(most_decoding, 24)),
        "prefill_tokens": draw(st.integers(1, 24)),
        "policy": draw(st.sampled_from(["fcfs", "lpm", "priority"])),
        "radix": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "ranks": draw(st.sampled_from(ranks)),
        "placement": draw(st.sampled_from(sorted(PLACEMENTS))),
    }
    steps = st.integers(0, 20)
    arrivals = draw(st.lists(arrival(context_length, steps), min_size=2, max_size=9))
    return Scenario(core, arrivals, draw(st.lists(steps, max_size=2)))


@st.composite
def arrival(draw: st.DrawFn, context_length: int, steps: st.SearchStrategy[int]) -> Arrival:
    stem = draw(st.sampled_from(STEMS))[: draw(st.sampled_from([0, 3, 8, 16, 17, 24]))]
    max_tokens = draw(st.sampled_from([None, 0, 1, 3, 10, 20]))
    longest = context_length - (max_tokens != 0)
    prompt = (stem + draw(st.lists(st.sampled_from([1, 2, 11]), min_size=1, max_size=3)))[-longest:]
    params: dict = {
        "max_tokens": max_tokens,
        "temperature": draw(st.sampled_from([0.0, 0.7])),
        "seed": draw(st.none() | st.integers(0, 3)),
        "ignore_eos": draw(st.sampled_from([True, True, True, False])),
        "stop_token_ids": tuple(draw(st.sampled_from([[], [], [], [6], [8, 3]]))),
        "min_tokens": draw(st.sampled_from([0, 0, 3])) if max_tokens is None or max_tokens >= 3 else 0,
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "logprobs": draw(st.sampled_from([None, None, 0, 2])),
        "regex": draw(st.sampled_from([None, None, None, "a+", "b+"])),
        "prompt_logprobs": draw(st.sampled_from([None, None, None, 1])),
        "priority": draw(st.sampled_from([0, 0, 1, -2])),
    }
    params["ignore_eos"] &= params["regex"] is None
    at = draw(st.just(0) | steps)
    abort_at = draw(st.none() | st.none() | st.integers(at, at + 12))
    return Arrival(at, prompt, draw(st.sampled_from(["", "", "adapter"])), params, abort_at)


def run(scenario: Scenario) -> Client:
    """Run a scenario. The client checks invariants after each step."""
    grammars = Grammars(FakeGrammars(VOCAB), most_kept=0)
    core = make_core(vocab_size=VOCAB, eos=0, **scenario.core, grammars=grammars)
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


def check(scenario: Scenario, client: Client) -> None:
    """Check that every answer is the one computed by hand, and that every page of every rank is back."""
    for answer in client.answers.values():
        answer.check(VOCAB)
    assert len(client.flushed) == len(scenario.flushes)
    scheduler = client.core.scheduler
    for cache in scheduler.caches:
        assert cache.num_available_pages == cache.num_usable_pages
    scheduler.flush()
    for cache in scheduler.caches:
        assert cache.pool.num_free == cache.num_usable_pages
    assert scheduler.counters.generated_tokens == sum(map(len, client.tokens.values()))


def for_scenarios(width: str, examples: int, ranks: tuple[int, ...], property_of: Callable[[Scenario], None]) -> None:
    """Test a property with this many scenarios of width 1, and with a fraction of them for other widths."""
    profile = settings(
        max_examples=int(examples * EXAMPLES[width]),
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
    )
    profile(given(scenarios(width, ranks))(property_of))()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_request_gets_its_tokens_and_every_page_comes_back(width: str) -> None:
    def holds(scenario: Scenario) -> None:
        check(scenario, run(scenario))

    for_scenarios(width, 250, (1,), holds)


@pytest.mark.parametrize("width", WIDTHS)
def test_on_several_ranks_every_request_gets_the_tokens_of_one_rank(width: str) -> None:
    for_scenarios(width, 100, (2, 4), _answers_of_one_rank)


def _answers_of_one_rank(scenario: Scenario) -> None:
    client = run(scenario)
    check(scenario, client)
    alone = run(dataclasses.replace(scenario, core={**scenario.core, "ranks": 1}))
    for key, answer in client.answers.items():
        if (other := alone.answers[key]).reason == answer.reason:
            n = min(len(answer.tokens), len(other.tokens))  # an aborted request has more tokens in the faster run
            assert answer.tokens[:n] == other.tokens[:n]
            assert answer.reason is not None
            assert n == len(answer.tokens) == len(other.tokens) or answer.reason.type == "abort"


@pytest.mark.parametrize("width", WIDTHS)
def test_no_step_exceeds_its_budgets(width: str) -> None:
    for_scenarios(width, 60, (1, 2, 4), _stays_in_its_budgets)


def _stays_in_its_budgets(scenario: Scenario) -> None:
    client = run(scenario)
    config = client.core.scheduler.config
    for plan in client.core.runner.plans:
        for rank in np.unique(plan.rank):
            of_rank = plan.rank == rank
            num_tokens, num_rows = plan.num_new[of_rank].sum(), of_rank.sum()
            assert num_tokens <= config.max_step_tokens
            assert num_rows <= config.max_running_requests
            assert plan.num_new[of_rank & ~plan.from_device].sum() <= config.max_prefill_tokens
            updates = np.isin(plan.page_updates[0], plan.rows[of_rank]).sum()
            num_written = num_tokens + num_rows * config.lookahead
            assert updates <= num_rows + num_written // scenario.core["page_size"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_under_page_pressure_preempt_share_prefixes_and_answer_right(
    ranks: int, placement: str, width: str
) -> None:
    """The same property in a scenario in which every rank runs, preempts and finds prefixes."""
    core = make_core(
        vocab_size=VOCAB,
        eos=0,
        ranks=ranks,
        placement=placement,
        rows=4,
        num_usable_pages=14,
        context_length=40,
        width=WIDTHS[width],
    )
    client = Client(core)
    for key in range(8 * ranks):
        stem = STEMS[key % 2][: 4 * (key % 4)]
        client.submit(
            key, [*stem, key % VOCAB, 5], max_tokens=24, ignore_eos=True, temperature=0.5 * (key % 3), seed=key
        )
    for step in range(12):
        client.step()
        if step == 8:
            core.handle(Abort([1, 2]))
    client.run()
    for answer in client.answers.values():
        answer.check(VOCAB)
    assert core.scheduler.counters.preemptions > 0
    assert core.scheduler.counters.cached_tokens > 0
    assert {rank for plan in core.runner.plans for rank in plan.rank.tolist()} == set(range(ranks))
