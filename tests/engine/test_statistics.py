"""Tests of the engine's reports on drafts: totals, the acceptance over a log interval, and a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import pytest

from fakes.fake_runner import two_of_three
from messages import says
from sgl_jax.engine import statistics
from sgl_jax.engine.messages import DraftCounts, Event, Generate, StepOutput
from sgl_jax.engine.speculation_plan import draft_model_name
from sgl_jax.request import SamplingParams
from sgl_jax.settings.server_args import ServerArgs
from simulated import Client, make_core

W = 4


def right(kv: int) -> bool:
    return True


def wrong(kv: int) -> bool:
    return False


def ran(
    *,
    requests: int = 8,
    width: int = W,
    draft_is_right: Callable[[int], bool] = two_of_three,
    disable_speculation: bool = False,
    **options,
) -> Client:
    """Run requests of 50 tokens on rows of width W."""
    core = make_core(
        rows=8, step_tokens=32, num_usable_pages=160, width=lambda n: width, draft_is_right=draft_is_right, **options
    )
    client = Client(core)
    for key in range(requests):
        client.submit(key, [key, 2, 3], max_tokens=50, ignore_eos=True, disable_speculation=disable_speculation)
    client.run()
    return client


@pytest.mark.parametrize("overlap", [True, False])
def test_drafts_are_reported_step_by_step_and_in_total(overlap: bool) -> None:
    core = make_core(overlap=overlap, width=lambda n: W)
    outputs = []
    for key in range(3):
        core.handle(Generate(key, [key, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True)))
    while core.busy:
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(core.step()), type=list[Event])  # as to another process
        outputs += [event for event in sent if isinstance(event, StepOutput)]
    by_step = [DraftCounts(1, drafted, accepted) for output in outputs for _, drafted, accepted in output.drafts]
    total = DraftCounts(*map(sum, zip(*by_step, strict=True)))
    stats = outputs[-1].stats
    assert stats is not None
    assert stats.drafts == total
    assert total.drafted == 3 * total.steps
    assert 0 < total.accepted < total.drafted
    assert sum(stats.accepted_per_position) == total.accepted
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)
    for key in range(3):
        accepted = [held for output in outputs for of, _, held in output.drafts if of == key]
        gained = 1 + len(accepted) + sum(accepted)
        assert 30 <= gained < 30 + W  # the first token, then those of each step, the last of which may be cut


def lines(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith(beginning)]


@pytest.mark.parametrize(("draft_is_right", "length", "rate"), [(right, 4.0, 1.0), (wrong, 1.0, 0.0)])
def test_decode_lines_and_gauges_have_the_acceptance_of_the_interval(
    draft_is_right: Callable[[int], bool], length: float, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sgl_jax")
    client = ran(requests=2, draft_is_right=draft_is_right, decode_log_interval=5)
    decoding = lines(caplog, "Decode batch")
    assert decoding
    assert all(f", accept len: {length:.2f}, accept rate: {rate:.2f}, gen throughput" in line for line in decoding)
    assert (client.stats[-1].spec_accept_length, client.stats[-1].spec_accept_rate) == (length, rate)


def test_decode_lines_say_nothing_of_acceptance_without_speculation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sgl_jax")
    client = ran(requests=2, width=1, decode_log_interval=5)
    assert not any("accept" in line for line in lines(caplog, "Decode batch"))
    assert (client.stats[-1].drafts, client.stats[-1].accepted_per_position) == (DraftCounts(), [])


def test_a_draft_model_that_is_never_right_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    client = ran(draft_is_right=wrong, draft_model="org/head")
    client.submit(99, [1], max_tokens=50, ignore_eos=True)
    client.run()
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert says(warning, "0 of … org/head … 5%")


@pytest.mark.parametrize(
    ("draft_is_right", "draft_model", "requests"),
    [(two_of_three, "org/head", 8), (wrong, "", 8), (wrong, "org/head", 1)],
    ids=["works", "n-grams", "too few drafts to tell"],
)
def test_other_drafts_are_not_warned_of(
    draft_is_right: Callable[[int], bool], draft_model: str, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    ran(draft_is_right=draft_is_right, draft_model=draft_model, requests=requests)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_requests_without_drafts_leave_the_numbers_as_they_are() -> None:
    client = ran(requests=2, draft_is_right=right, disable_speculation=True)
    assert client.stats[-1].drafts == DraftCounts()
    assert client.stats[-1].accepted_per_position == [0] * (W - 1)
    assert client.core.scheduler.counters.steps >= 50  # a token each


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, ""),
        ({"speculative_algorithm": "NGRAM"}, ""),
        ({"speculative_algorithm": "NEXTN"}, "the MTP layers of org/model"),
        ({"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "org/head"}, "org/head"),
    ],
)
def test_messages_name_the_draft_model(flags: dict[str, str], name: str) -> None:
    assert draft_model_name(ServerArgs(model_path="org/model", **flags)) == name


def test_steps_are_timed_without_the_pauses_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(statistics.time, "perf_counter", lambda: now[0])
    clock = statistics.StepClock()
    for event, seconds in (("launched", 0), ("prompt", 3), ("launched", 0), ("decode", 2), ("pause", 0)) * 2:
        now[0] += seconds
        if event in ("prompt", "decode"):
            clock.collected(decodes=event == "decode")
        else:
            getattr(clock, event)()
        if event == "pause":
            now[0] += 1000
    assert (clock.seconds, clock.decode_seconds, clock.decode_steps) == (10, 4, 2)


def test_reports_have_the_steps_that_decode_and_the_memory_of_the_process() -> None:
    stats = ran(requests=2, width=1).stats[-1]
    assert 0 < stats.decode_steps < stats.steps
    assert 0 < stats.decode_step_seconds < stats.step_seconds
    assert stats.resident_bytes > 1 << 20
