"""The engine core over a device whose output can be computed by hand: commands in, steps, events out."""

from __future__ import annotations

import random

import msgspec
import pytest

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import (
    Abort,
    CacheFlushed,
    FlushCache,
    Generate,
    Stats,
    StepOutput,
)
from sgl_jax.request import FinishReason, SamplingParams
from sgl_jax.step_plan import Param, RowFlag
from simulated import Client, make_core

VOCAB = 512
LONG = list(range(100, 130))  # a prompt of 30 tokens: 7 pages of 4 and two tokens


@pytest.fixture(params=[True, False], ids=["overlap", "plain"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return request.param


def check(client: Client) -> None:
    for answer in client.answers.values():
        answer.check(VOCAB)
    cache = client.core.scheduler.caches[0]
    assert cache.num_available_pages == cache.num_usable_pages


def test_tokens_come_one_a_step_and_the_last_with_the_finish(overlap: bool) -> None:
    core = make_core(overlap=overlap)
    core.handle(Generate(5, [1, 2, 3], SamplingParams(max_tokens=3, temperature=0.0)))
    outputs = [event for _ in range(6) for event in core.step() if isinstance(event, StepOutput) and event.keys]
    assert [o.keys for o in outputs] == [[5]] * 3
    assert [[p.key for p in o.prompts] for o in outputs] == [[5], [], []]
    assert 0 < outputs[0].prompts[0].queue_seconds < 10
    assert [[(f.key, f.reason.type) for f in o.finished] for o in outputs] == [[], [], [(5, "length")]]


def answered_while_programs_are_compiled(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Core, Client]:
    """Run six steps, in which a request gets its three tokens and three programs stay uncompiled."""
    monkeypatch.setattr("sgl_jax.engine.core._WAIT_S", 0.0)
    core = make_core(overlap=overlap)
    monkeypatch.setattr(core.runner, "num_compiling", 3)
    client = Client(core)
    client.submit(0, [1, 2, 3], max_tokens=3)
    for _ in range(6):
        client.step()
    return core, client


def test_the_last_answer_s_numbers_come_at_once_while_programs_are_compiled(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, client = answered_while_programs_are_compiled(overlap, monkeypatch)
    for _ in range(44):
        client.step()
    assert (client.stats[-1].num_running, client.stats[-1].generated_tokens) == (0, 3)
    assert len(client.stats) < 10  # steps in which nothing happens say so at most every quarter of a second
    assert client.stats[-1].num_compiling == 3
    monkeypatch.setattr("time.sleep", lambda _: monkeypatch.setattr(core.runner, "num_compiling", 0))
    client.step()  # the last one, in which the last program is compiled
    assert client.stats[-1].num_compiling == 0
    assert not core.busy


def test_the_last_report_says_that_nothing_is_compiled_whenever_the_last_program_came(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, client = answered_while_programs_are_compiled(overlap, monkeypatch)
    assert client.stats[-1].num_compiling == 3
    monkeypatch.setattr(core.runner, "num_compiling", 0)  # after the step's report
    while core.busy:
        client.step()
    assert client.stats[-1].num_compiling == 0


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_right_while_programs_are_still_compiled(
    overlap: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planned step waits for its programs. Requests come, end and are preempted meanwhile, and the cache is flushed."""
    monkeypatch.setattr("sgl_jax.engine.core._WAIT_S", 0.0)
    rng = random.Random(seed)
    core = make_core(overlap=overlap, num_usable_pages=16)
    monkeypatch.setattr(core.runner, "can_launch", lambda plan: rng.random() < 0.3, raising=False)
    client = Client(core)
    for key in range(24):
        prompt = LONG[: rng.randrange(30)] + [key] * rng.randrange(1, 9)
        client.submit(key, prompt, max_tokens=rng.randrange(1, 24))
        for _ in range(rng.randrange(8)):
            client.step()
        if key % 5 == 4:
            core.handle(Abort([rng.randrange(key)]))
        if key % 7 == 6:
            core.handle(FlushCache(key))
    client.run(5000)
    core.handle(FlushCache(99))
    client.run()
    check(client)
    assert client.stats[-1].preemptions > 0


def test_an_abort_is_answered_while_a_step_waits_for_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    monkeypatch.setattr(core.runner, "num_compiling", 3, raising=False)
    monkeypatch.setattr(core.runner, "can_launch", lambda plan: False, raising=False)
    client = Client(core)
    client.submit(1, [5, 6], max_tokens=4)
    for _ in range(20):
        client.step()
    assert [(stats.num_compiling, stats.steps) for stats in client.stats] == [(3, 1)] * len(client.stats)
    assert len(client.stats) >= 2  # the watchdog goes by these
    core.handle(Abort([1]))
    client.step()
    assert client.answers[1].reason == FinishReason("abort")
    monkeypatch.undo()
    client.run()
    assert core.runner.plans[-1].keys.tolist() == [1]  # later plans count on what it computes


def test_with_overlap_a_step_is_launched_before_the_one_before_is_collected() -> None:
    core = make_core(overlap=True)
    core.handle(Generate(5, [1, 2, 3], SamplingParams(max_tokens=2)))
    launched = lambda: len(core.runner.plans)  # noqa: E731
    first = core.step()
    assert (launched(), [e.keys for e in first if isinstance(e, StepOutput)]) == (1, [[]])
    second = core.step()
    assert launched() == 2
    assert second[0].keys == [5]
    assert core.busy
    third = core.step()
    assert launched() == 2
    assert [f.key for f in third[0].finished] == [5]
    assert not core.busy


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("width", [1, 4])
def test_a_prompt_that_fills_context_and_pool_is_computed_without_output(
    overlap: bool, radix: bool, width: int
) -> None:
    """Scores included; and each such request gets the whole pool in turn, beside one that generates."""
    options = {"overlap": overlap, "radix": radix, "context_length": 32, "page_size": 4, "width": lambda n: width}
    client = Client(make_core(num_usable_pages=8 if width == 1 else 9, **options))
    full = [*LONG, 7, 8]
    client.submit(1, full, max_tokens=0, prompt_logprobs=2, logprobs=1)
    client.submit(2, full, max_tokens=0)
    client.submit(3, full[:1], max_tokens=0, prompt_logprobs=0)
    client.submit(4, full[:9], max_tokens=5, ignore_eos=True)
    client.submit(5, full, max_tokens=0, prompt_logprobs=0)
    client.run()
    check(client)
    assert [len(client.tokens[key]) for key in range(1, 6)] == [0, 0, 0, 5, 0]
    assert [len(client.answers[key].prompt.logprobs) for key in (1, 3, 5)] == [32, 1, 32]
    assert client.core.scheduler.counters.generated_tokens == 5


def test_the_host_plans_while_the_device_computes(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With overlap each step is launched before the one before it is collected: the device never waits for the host."""
    core = make_core(overlap=overlap)
    launch, collect = core.runner.launch, core.runner.collect
    order: list[tuple[str, int]] = []

    def launched(plan):
        flight = launch(plan)
        order.append(("launch", flight.number))
        return flight

    def collected(flight):
        order.append(("collect", flight.number))
        return collect(flight)

    monkeypatch.setattr(core.runner, "launch", launched)
    monkeypatch.setattr(core.runner, "collect", collected)
    client = Client(core)
    client.submit(1, [1, 2], max_tokens=8, ignore_eos=True)
    client.run()
    check(client)
    ahead = 1 if overlap else 0
    steps = [("launch", 1)] * ahead
    for number in range(1, 9):
        steps += [("launch", number + ahead)] * (number + ahead <= 8) + [("collect", number)]
    assert order == steps


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_overlap_and_no_overlap_give_the_same_tokens(page_size: int, radix: bool) -> None:
    tokens = []
    for overlap in (True, False):
        client = Client(make_core(overlap=overlap, page_size=page_size, radix=radix, num_usable_pages=96 // page_size))
        for key in range(6):
            client.submit(key, LONG[: 5 * key + 2], max_tokens=20, temperature=0.5 * (key % 2), seed=key)
        client.run()
        check(client)
        tokens.append(client.tokens)
    assert tokens[0] == tokens[1]


def test_an_abort_while_waiting_ends_the_request_without_a_token(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap, rows=1))
    client.submit(1, [1, 2], max_tokens=4)
    client.submit(2, [3, 4], max_tokens=4)
    client.step()
    client.core.handle(Abort([2]))
    client.step()
    assert client.answers[2].reason == FinishReason("abort")
    assert client.answers[2].tokens == []
    client.run()
    check(client)
    assert len(client.tokens[1]) == 4


@pytest.mark.parametrize("after", range(1, 6))
def test_an_abort_at_any_step_ends_the_request_and_returns_its_pages(overlap: bool, after: int) -> None:
    """Steps 1 to 3 are chunks of the prompt, later ones decode; with overlap one step is always in flight."""
    client = Client(make_core(overlap=overlap, step_tokens=12))
    client.submit(1, LONG, max_tokens=20)
    for _ in range(after):
        client.step()
    before = list(client.tokens[1])
    client.core.handle(Abort([1, 99]))  # an unknown key is nothing to answer
    assert client.core.busy
    client.run()
    assert client.answers[1].reason == FinishReason("abort")
    assert client.tokens[1] == before
    check(client)


def test_an_abort_after_the_end_is_not_answered(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    client.submit(1, [1, 2], max_tokens=1)
    client.run()
    client.core.handle(Abort([1]))
    assert not client.core.busy
    client.run()
    check(client)


def test_an_aborted_neighbour_changes_nothing(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    for key in (1, 2, 3):
        client.submit(key, [*LONG[:9], key], max_tokens=9)
    for _ in range(3):
        client.step()
    client.core.handle(Abort([2]))
    client.run()
    check(client)
    assert [len(client.tokens[key]) for key in (1, 3)] == [9, 9]


def test_cached_tokens_are_reported_with_the_first_token(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    for key, prompt in enumerate((LONG, LONG, [*LONG[:10], 7, 8, 9], [7, 8, 9])):
        client.submit(key, prompt, max_tokens=2)
        client.run()
    prompts = [answer.prompt for answer in client.answers.values()]
    assert [p and p.num_cached_tokens for p in prompts] == [0, 28, 8, 0]
    assert (client.stats[-1].prompt_tokens, client.stats[-1].cached_tokens) == (76, 36)
    check(client)


def test_namespaces_do_not_share_prefixes(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    for key, namespace in enumerate(("a", "b", "a")):
        client.submit(key, LONG, max_tokens=1, namespace=namespace)
        client.run()
    prompts = [answer.prompt for answer in client.answers.values()]
    assert [p and p.num_cached_tokens for p in prompts] == [0, 0, 28]
    check(client)


def test_logprobs_go_to_those_who_asked_as_many_as_they_asked_for(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    for key, wanted in enumerate((None, 0, 3, None, 20)):
        client.submit(key, LONG[: 3 * key + 1], max_tokens=3 + key, logprobs=wanted, ignore_eos=True)
    client.run()
    check(client)  # each value against the one computed by hand
    assert [len(a.logprobs) for a in client.answers.values()] == [0, 4, 5, 0, 7]
    assert [len(a.logprobs[0].top_ids) for a in client.answers.values() if a.logprobs] == [0, 3, 20]


@pytest.mark.parametrize("step_tokens", [4, 7, 64])
def test_every_prompt_token_is_scored_whatever_the_chunks(overlap: bool, step_tokens: int) -> None:
    client = Client(make_core(overlap=overlap, step_tokens=step_tokens))
    client.submit(1, LONG, max_tokens=3, prompt_logprobs=2)
    client.submit(2, LONG[:13], max_tokens=3, prompt_logprobs=0, logprobs=1)
    client.submit(3, [4], max_tokens=3, prompt_logprobs=5)
    client.run()
    check(client)
    prompt = client.answers[3].prompt
    assert prompt is not None
    assert prompt.logprobs == [None]


def test_a_cached_prompt_is_scored_whole(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    client.submit(1, LONG, max_tokens=1)
    client.run()
    client.submit(2, LONG, max_tokens=1, prompt_logprobs=1)
    client.run()
    check(client)


def test_flush_drops_what_no_running_request_holds(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    client.submit(1, LONG[:8], max_tokens=1)
    client.run()
    client.submit(2, [*LONG[:4], 1, 2, 3, 4, 5], max_tokens=9)
    client.step()
    client.core.handle(FlushCache(42))
    client.step()
    assert client.flushed == [CacheFlushed(42, 1)]  # one of the two that request 1 left; request 2 holds the other
    client.run()
    client.submit(3, LONG[:9], max_tokens=1)
    client.run()
    prompt = client.answers[3].prompt
    assert prompt is not None
    assert prompt.num_cached_tokens == 4
    check(client)


def test_flush_is_answered_by_an_idle_engine() -> None:
    client = Client(make_core())
    client.core.handle(FlushCache(1))
    assert client.core.busy
    client.step()
    assert client.flushed == [CacheFlushed(1, 0)]
    assert not client.core.busy


def sampled(random_seed: int | None, seeds: list[int | None]) -> list[list[int]]:
    client = Client(make_core(random_seed=random_seed))
    for key, seed in enumerate(seeds):
        client.submit(key, [1, 2, 3], max_tokens=12, temperature=1.0, seed=seed)
    client.run()
    check(client)
    return list(client.tokens.values())


def test_random_seed_decides_the_tokens_of_requests_without_one() -> None:
    first, again, other = sampled(7, [None, None]), sampled(7, [None, None]), sampled(8, [None, None])
    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_a_requests_seed_decides_its_tokens_whatever_the_engines() -> None:
    ours = sampled(7, [3, None])[0]
    assert sampled(8, [None, 3])[1] == ours
    assert sampled(None, [3])[0] == ours
    assert sampled(7, [4])[0] != ours


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63, 2**64 - 1, -(2**63)])
def test_any_seed_of_64_bits_is_taken(seed: int) -> None:
    assert len(sampled(0, [seed])[0]) == 12


def test_eos_ends_a_request_unless_ignored_and_not_before_min_tokens(overlap: bool) -> None:
    free = Client(make_core(overlap=overlap))
    free.submit(1, LONG, max_tokens=10, temperature=0.0, ignore_eos=True)
    free.run()
    eos = free.tokens[1][4]
    assert eos not in free.tokens[1][:4]
    client = Client(make_core(overlap=overlap, eos=eos))
    client.submit(1, LONG, max_tokens=10, temperature=0.0)
    client.submit(2, LONG, max_tokens=10, temperature=0.0, ignore_eos=True)
    client.submit(3, LONG, max_tokens=10, temperature=0.0, min_tokens=5)
    client.run()
    check(client)
    assert client.tokens[1] == free.tokens[1][:5]
    assert client.answers[1].reason == FinishReason("stop", eos)
    assert client.tokens[2] == free.tokens[1]
    assert client.tokens[3][:4] == free.tokens[1][:4]
    assert client.tokens[3][4] != eos


def test_the_context_ends_what_max_tokens_does_not(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap, context_length=40))
    client.submit(1, LONG, max_tokens=None, ignore_eos=True)
    client.submit(2, LONG, max_tokens=100, ignore_eos=True)
    client.run()
    check(client)
    assert [len(t) for t in client.tokens.values()] == [10, 10]


def test_preempted_requests_resume_with_the_same_tokens(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap, num_usable_pages=16, page_size=4, context_length=64))
    for key in range(4):
        client.submit(key, [key, *LONG[:5]], max_tokens=30, frequency_penalty=0.1 * (key % 2), ignore_eos=True)
    client.run()
    check(client)
    assert client.stats[-1].preemptions > 0


def test_an_idle_engine_has_nothing_to_do_and_says_where_it_stands(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap))
    assert not client.core.busy
    client.submit(1, LONG, max_tokens=3, ignore_eos=True)
    assert client.core.busy
    client.run()
    assert not client.core.busy
    # 30 prompt tokens and 2 of the output have KV: 8 pages of 64, all of them in the tree.
    # Two chunks of 16 and 14 tokens, the last of which samples; then two decodes.
    last = client.stats[-1]
    times = dict.fromkeys(("step_seconds", "decode_step_seconds", "resident_bytes"), 0)
    expected = Stats(cached_usage=8 / 64, prompt_tokens=30, generated_tokens=3, steps=4, decode_steps=2)
    assert msgspec.structs.replace(last, **times) == expected


def test_stats_count_running_waiting_and_the_share_of_pages_in_use() -> None:
    client = Client(make_core(overlap=False, rows=2, step_tokens=64))
    for key in range(3):
        client.submit(key, LONG[key * 7 : key * 7 + 7], max_tokens=9, ignore_eos=True)
    client.step()
    stats = client.stats[-1]
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (2, 1, 4 / 64)


def test_stats_and_flush_are_over_all_data_ranks(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap, ranks=4, rows=1, placement="round_robin", num_usable_pages=16))
    for key in range(5):
        client.submit(key, [key, *LONG[:8]], max_tokens=3, ignore_eos=True)
    client.step()
    stats = client.stats[-1]
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (4, 1, 4 * 3 / 64)
    client.run()
    assert (client.stats[-1].kv_usage, client.stats[-1].cached_usage) == (0, 5 * 2 / 64)
    client.core.handle(FlushCache(7))
    client.step()
    assert client.flushed == [CacheFlushed(7, 10)]
    for answer in client.answers.values():
        answer.check(VOCAB)


def test_each_data_ranks_logprobs_reach_their_requests(overlap: bool) -> None:
    client = Client(make_core(overlap=overlap, ranks=2, step_tokens=8))
    for key in range(6):
        client.submit(key, LONG[: 3 * key + 1], max_tokens=3 + key, logprobs=key, prompt_logprobs=1, ignore_eos=True)
    client.run()
    for answer in client.answers.values():
        answer.check(VOCAB)


def test_a_prompt_is_not_scored_again_at_each_decode() -> None:
    client = Client(make_core())
    client.submit(1, LONG, max_tokens=6, prompt_logprobs=1, ignore_eos=True)
    client.run()
    flags = [bool(plan.params[0, Param.FLAGS] & RowFlag.PROMPT_LOGPROBS) for plan in client.core.runner.plans]
    assert flags == [True, True, False, False, False, False, False]
