"""The service between API calls and engine messages, over a transport that a test plays by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from fakes.fake_core import fake_info
from sgl_jax.engine import waiting_queue
from sgl_jax.engine.generation import (
    Choice,
    DuplicateRequestId,
    EngineFailed,
    Generation,
    GenerationRequest,
    QueueFull,
    ServiceUnavailable,
)
from sgl_jax.engine.messages import (
    Abort,
    CompileGrammar,
    EngineDied,
    Finished,
    Generate,
    GrammarCompiled,
    PromptScored,
    Ready,
    Refused,
    StateChanged,
    StepOutput,
    TokenLogprobs,
    UpdateWeights,
)
from sgl_jax.engine.native_call import native_call
from sgl_jax.engine.native_params import LogprobOptions
from sgl_jax.engine.service import GenerationService
from sgl_jax.request import FinishReason, InvalidParameter, SamplingParams
from sgl_jax.text.detokenizer import Detokenizer
from sgl_jax.text.tokenizer import load_tokenizer

STORIES_FOLDER = str(Path(__file__).parents[1] / "data" / "stories260k")
STORIES = load_tokenizer(STORIES_FOLDER)
ONCE, UPON, A, TIME = STORIES.encode("Once upon a time", add_special_tokens=False)


class HandTransport:
    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.send = self.sent.append

    def start(self, on_event: Callable[[Any], None]) -> None:
        self.emit = on_event
        on_event(Ready(fake_info()))

    async def close(self, timeout: float) -> None: ...

    def keys(self) -> list[int]:
        return [command.key for command in self.sent if isinstance(command, Generate)]


async def opened(**options: Any) -> tuple[GenerationService, HandTransport]:
    transport = HandTransport()
    service = GenerationService(transport, STORIES, **options)
    await service.start()
    service.open()
    return service, transport


def request(*ids: int, **params: Any) -> GenerationRequest:
    return GenerationRequest(list(ids) or [ONCE], SamplingParams(**params))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 5))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def collect(generation: Any) -> list[Any]:
    return [update async for updates in generation.updates() for update in updates]


def test_tokens_become_text_as_they_come() -> None:
    async def test() -> None:
        service, transport = await opened()
        updates = (await service.submit([request(ONCE)], stream=True)).updates()
        [key] = transport.keys()
        transport.emit(StepOutput([key], [UPON], prompts=[PromptScored(key, 3)]))
        [first] = await anext(updates)
        assert (first.text, first.token_ids, first.num_cached_tokens, first.finish) == (" upon", [UPON], 3, None)
        transport.emit(StepOutput([key], [A]))
        transport.emit(StepOutput([key], [TIME], finished=[Finished(key, FinishReason("length"))]))
        [last] = await anext(updates)
        assert (last.text, last.token_ids) == (" a time", [A, TIME])
        assert last.finish == FinishReason("length")
        with pytest.raises(StopAsyncIteration):
            await anext(updates)
        assert service.num_live == 0
        assert not any(isinstance(command, Abort) for command in transport.sent)

    run(test)


def test_without_stream_the_consumer_runs_once() -> None:
    async def test() -> None:
        service, transport = await opened()
        task = asyncio.ensure_future(collect(await service.submit([request(ONCE)], stream=False)))
        await settle()
        [key] = transport.keys()
        for token in (UPON, A):
            transport.emit(StepOutput([key], [token]))
            await settle()
        transport.emit(StepOutput([key], [2], finished=[Finished(key, FinishReason("stop", 2))]))
        [update] = await task
        assert (update.text, update.token_ids) == (" upon a", [UPON, A, 2])

    run(test)


def test_a_stop_token_is_counted_but_not_shown() -> None:
    async def test() -> None:
        for keep, text in ((False, " upon"), (True, " upon a")):
            service, transport = await opened()
            asked = request(ONCE, stop_token_ids=(A,), include_stop_str_in_output=keep)
            task = asyncio.ensure_future(collect(await service.submit([asked], stream=False)))
            await settle()
            [key] = transport.keys()
            transport.emit(StepOutput([key], [UPON]))
            transport.emit(StepOutput([key], [A], finished=[Finished(key, FinishReason("stop", A))]))
            [update] = await task
            assert (update.text, update.token_ids) == (text, [UPON, A])

    run(test)


def test_a_stop_string_aborts_and_drops_what_came_after() -> None:
    async def test() -> None:
        service, transport = await opened()
        task = asyncio.ensure_future(collect(await service.submit([request(ONCE, stop=("on a",))], stream=True)))
        await settle()
        [key] = transport.keys()
        transport.emit(StepOutput([key, key, key], [UPON, A, TIME]))
        [update] = await task
        assert (update.text, update.token_ids, update.finish) == (" up", [UPON, A], FinishReason("stop", "on a"))
        assert transport.sent[-1] == Abort([key])
        transport.emit(StepOutput([key], [TIME], finished=[Finished(key, FinishReason("abort"))]))
        assert service.num_live == 0

    run(test)


def test_a_stop_string_in_the_last_token_before_eos_leaves_eos_out() -> None:
    async def test() -> None:
        service, transport = await opened()
        generation = await service.submit([request(stop=("time",), logprobs=0)], stream=False)
        [key] = transport.keys()
        for token in (A, TIME):
            transport.emit(StepOutput([key], [token], logprobs={0: TokenLogprobs(-1.0)}))
        eos = Finished(key, FinishReason("stop", 2))
        transport.emit(StepOutput([key], [2], logprobs={0: TokenLogprobs(-1.0)}, finished=[eos]))
        [update] = await collect(generation)
        assert (update.text, update.token_ids, len(update.logprobs)) == (" a ", [A, TIME], 2)
        assert update.finish == FinishReason("stop", "time")

    run(test)


@pytest.mark.parametrize("stop", [(), ("time",)])
def test_an_answer_tells_the_fate_of_its_drafts_also_when_a_stop_string_ends_it(stop: tuple[str, ...]) -> None:
    async def test() -> None:
        service, transport = await opened()
        params = SamplingParams(stop=stop)
        call = native_call(STORIES, 512, None, [[ONCE], [UPON]], params, None, LogprobOptions())
        answers = asyncio.ensure_future(call.result(service))
        await settle()
        key, other = transport.keys()
        transport.emit(StepOutput([key], [UPON]))
        transport.emit(StepOutput([key], [A], drafts=[(key, 3, 0)]))
        transport.emit(StepOutput([key, key, key], [UPON, A, TIME], drafts=[(key, 2, 2), (7, 3, 1)]))
        ends = [Finished(other, FinishReason("length"))]
        transport.emit(StepOutput([other], [A], ends if stop else [*ends, Finished(key, FinishReason("length"))]))
        drafted, plain = (answer["meta_info"] for answer in await answers)
        assert drafted["finish_reason"]["type"] == ("stop" if stop else "length")
        assert {name: value for name, value in drafted.items() if name.startswith("spec_")} == {
            "spec_verify_ct": 2,
            "spec_proposed_drafts": 5,
            "spec_accepted_drafts": 2,
            "spec_accept_length": 2.0,
            "spec_accept_rate": 0.4,
        }
        assert [name for name in plain if name.startswith("spec_")] == []

    run(test)


@pytest.mark.parametrize("ended", ["length", "abort"])
def test_a_request_may_end_without_a_token(ended: Any) -> None:
    async def test() -> None:
        service, transport = await opened()
        asked = GenerationRequest([ONCE], SamplingParams(max_tokens=0, stop=("upon",), prompt_logprobs=0))
        generation = await service.submit([asked], stream=False)
        [key] = transport.keys()
        prompts = [PromptScored(key, 0, [None])] if ended == "length" else []
        transport.emit(StepOutput(finished=[Finished(key, FinishReason(ended))], prompts=prompts))
        [update] = await collect(generation)
        assert (update.text, update.token_ids, update.finish) == ("", [], FinishReason(ended))
        assert update.prompt_logprobs == ([None] if ended == "length" else None)
        assert service.num_live == 0

    run(test)


def test_what_cannot_be_sent_leaves_nothing_behind() -> None:
    async def test() -> None:
        service, transport = await opened(max_queued_requests=1)
        transport.send = msgspec.msgpack.encode
        asked = GenerationRequest([ONCE], SamplingParams(), "same", namespace="\ud800")
        for _ in range(2):
            with pytest.raises(UnicodeEncodeError):
                await service.submit([asked], stream=False)
            assert service.num_live == 0
        assert await service.drain(0.1)

    run(test)


def test_the_engine_is_not_told_what_is_not_its_business() -> None:
    async def test() -> None:
        service, transport = await opened()
        await service.submit([request(ONCE, n=2, stop=("x",), seed=5)], stream=False)
        sent = [command.params for command in transport.sent]
        assert [(params.n, params.stop, params.seed, params.max_tokens) for params in sent] == [
            (1, (), 5, 511),
            (1, (), 6, 511),
        ]

    run(test)


def test_leaving_early_aborts() -> None:
    async def test() -> None:
        service, transport = await opened()
        task = asyncio.ensure_future(collect(await service.submit([request(n=2), request()], stream=True)))
        await settle()
        keys = transport.keys()
        transport.emit(StepOutput(keys[:1], [A], finished=[Finished(keys[0], FinishReason("length"))]))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert transport.sent[-1] == Abort(keys[1:])
        assert service.num_live == 0

    run(test)


def test_aborting_by_id() -> None:
    async def test() -> None:
        service, transport = await opened()
        asked = request(n=2)
        asked.request_id = "mine"
        task = asyncio.ensure_future(collect(await service.submit([asked], stream=False)))
        await settle()
        with pytest.raises(InvalidParameter, match="mine"):
            await service.submit([asked], stream=False)
        assert (service.abort("other"), service.abort("mine")) == (0, 2)
        keys = transport.keys()
        assert transport.sent[-1] == Abort(keys)
        transport.emit(StepOutput(finished=[Finished(key, FinishReason("abort")) for key in keys]))
        assert [update.finish.type for update in await task] == ["abort", "abort"]
        assert service.abort("mine") == 0

    run(test)


def test_the_queue_holds_requests_without_a_token() -> None:
    async def test() -> None:
        service, transport = await opened(max_queued_requests=2)
        await service.submit([request(), request()], stream=False)
        with pytest.raises(QueueFull, match=r"limit .*2"):
            await service.submit([request()], stream=False)
        transport.emit(StepOutput(transport.keys()[:1], [A]))
        await service.submit([request()], stream=False)
        with pytest.raises(QueueFull):
            await service.submit([request()], stream=False)

    run(test)


def by_priority(monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    monkeypatch.setattr(GenerationService, "info", fake_info(priority_sign=sign))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_least_urgent_and_latest_make_way_in_a_full_queue(monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    by_priority(monkeypatch, sign)

    async def test() -> None:
        service, transport = await opened(max_queued_requests=4)
        made = [
            await service.submit([request(priority=sign * each)], stream=stream)
            for each, stream in ((2, False), (1, False), (1, True), (0, False))
        ]
        started, first, last, least = transport.keys()
        transport.emit(StepOutput([least], [A]))  # has a token, so it stays
        await service.submit([request(priority=sign * 2)], stream=False)  # takes its place
        await service.submit([request(priority=sign * 3)], stream=False)
        assert transport.sent[-2:-1] == [Abort([last])]
        with pytest.raises(QueueFull, match=r"more urgent.*4"):
            await collect(made[2])
        for wanted in (1, 0):  # none is less urgent, or there are too few of them
            with pytest.raises(QueueFull, match="4 requests are waiting"):
                await service.submit([request(priority=sign * wanted)], stream=False)
        with pytest.raises(QueueFull):
            await service.submit([request(priority=sign * 2, n=2)], stream=False)
        await service.submit([request(priority=sign * 9, n=3)], stream=False)
        assert {key for each in transport.sent if isinstance(each, Abort) for key in each.keys} >= {
            first,
            last,
            started,
        }
        assert service.num_live == 1 + 1 + 3  # the one that has begun, that of priority 3, and the new ones

    run(test)


def test_a_request_of_several_choices_makes_way_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    by_priority(monkeypatch, 1)

    async def test() -> None:
        service, transport = await opened(max_queued_requests=3)
        several = await service.submit([request(), request(n=2)], stream=True)
        await service.submit([request(priority=1)], stream=False)
        keys = transport.keys()[:3]
        assert [each for each in transport.sent if isinstance(each, Abort)] == [Abort(keys)]
        assert service.num_live == 1
        with pytest.raises(QueueFull) as refused:
            await collect(several)
        assert refused.value.retry_after >= 1
        half = await service.submit([request(n=2)], stream=True)
        transport.emit(StepOutput([transport.keys()[-1]], [A]))
        await service.submit([request(priority=1)], stream=False)
        with pytest.raises(QueueFull):  # half of it has begun
            await service.submit([request(priority=1)], stream=False)
        assert half.error is None

    run(test)


def test_nobody_makes_way_for_a_probe_or_for_a_request_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    by_priority(monkeypatch, -1)

    async def test() -> None:
        service, transport = await opened(max_queued_requests=1)
        waiting = await service.submit([request(priority=5)], stream=False)
        with pytest.raises(QueueFull):
            await service.probe(1)
        refused = asyncio.ensure_future(service.submit([request(regex="(")], stream=False))
        await settle()
        (command,) = [each for each in transport.sent if isinstance(each, CompileGrammar)]
        transport.emit(Refused(command.call, "unclosed group", "regex"))
        with pytest.raises(InvalidParameter, match="unclosed group"):
            await refused
        assert waiting.error is None
        assert service.num_live == 1

    run(test)


def test_a_full_queue_refuses_a_grammar_before_it_is_compiled() -> None:
    async def test() -> None:
        service, transport = await opened(max_queued_requests=2)
        compiling = asyncio.ensure_future(service.submit([request(regex="a"), request(regex="a")], stream=False))
        await settle()
        assert [type(command) for command in transport.sent] == [CompileGrammar]
        with pytest.raises(QueueFull):
            await service.submit([request(regex="b")], stream=False)
        assert len(transport.sent) == 1
        transport.emit(GrammarCompiled(transport.sent[0].call))
        await compiling
        assert len(transport.keys()) == 2

    run(test)


def test_more_than_the_queue_ever_holds_is_refused_for_good() -> None:
    async def test() -> None:
        service, transport = await opened(max_queued_requests=3)
        with pytest.raises(InvalidParameter, match=r"n .*4.* 3") as raised:
            await service.submit([request(n=4)], stream=False)
        assert raised.value.param == "n"
        with pytest.raises(InvalidParameter, match=r"prompt .*2 .*4 .*3") as raised:
            await service.submit([request(n=2), request(n=2)], stream=False)
        assert raised.value.param == "prompt"
        assert not transport.keys()
        await service.submit([request(n=3)], stream=False)

    run(test)


def test_other_tasks_run_while_many_choices_are_sent() -> None:
    async def test() -> None:
        service, transport = await opened()
        sent_at: list[int] = []  # choices that had been sent, each time that another task ran

        async def other() -> None:
            while len(transport.keys()) < 512:
                sent_at.append(len(transport.keys()))
                await asyncio.sleep(0)

        watching = asyncio.ensure_future(other())
        await service.submit([request()] * 256 + [request(n=64)] * 4, stream=False)
        await watching
        steps = [after - before for before, after in pairwise([*sent_at, 512])]
        assert max(steps) <= 64
        assert len(steps) >= 8

    run(test)


@pytest.mark.parametrize("end", ["cancel", "death"])
def test_a_submission_that_breaks_off_leaves_nothing_behind(end: str) -> None:
    async def test() -> None:
        service, transport = await opened(max_queued_requests=200)
        asked = [GenerationRequest([ONCE], SamplingParams(), f"rid {i}") for i in range(200)]
        task = asyncio.ensure_future(service.submit(asked, stream=False))
        while not transport.keys():
            await asyncio.sleep(0)
        with pytest.raises(DuplicateRequestId):
            await service.submit([GenerationRequest([ONCE], SamplingParams(), "rid 199")], stream=False)
        with pytest.raises(QueueFull):
            await service.submit([request()], stream=False)
        if end == "cancel":
            task.cancel()
        else:
            transport.emit(EngineDied("out of memory"))
        with pytest.raises(asyncio.CancelledError if end == "cancel" else EngineFailed):
            await task
        keys = transport.keys()
        assert 0 < len(keys) < 200
        assert (service.num_live, await service.drain(1)) == (0, True)
        if end == "cancel":
            assert transport.sent[-1] == Abort(keys)
            service.open()
            await service.submit(asked, stream=False)

    run(test)


def test_a_full_queue_says_when_it_will_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        now = [100.0]
        monkeypatch.setattr(waiting_queue, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        service, transport = await opened(max_queued_requests=40)

        async def retry_after() -> int:
            with pytest.raises(QueueFull) as refused:
                await service.submit([request()] * 40, stream=False)
            return refused.value.retry_after

        await service.submit([request()] * 40, stream=False)
        keys = transport.keys()
        assert await retry_after() == 1  # nothing is known yet
        now[0] += 5
        assert await retry_after() == 60  # 40 choices, and none has left in 5 s
        transport.emit(StepOutput(keys[:20], [A] * 20))
        assert await retry_after() == 5  # the other half
        service.abort_all()
        transport.emit(StepOutput(finished=[Finished(key, FinishReason("abort")) for key in keys[:39]]))
        now[0] += 3
        assert await retry_after() == 1
        transport.emit(StepOutput(keys[39:], [A]))
        now[0] += 1000  # an idle queue is no slow queue
        await service.submit([request()] * 40, stream=False)
        now[0] += 1
        transport.emit(StepOutput(transport.keys()[40:50], [A] * 10))
        assert await retry_after() == 3

    run(test)


def test_death_fails_everything_and_everyone() -> None:
    async def test() -> None:
        service, transport = await opened()
        task = asyncio.ensure_future(collect(await service.submit([request()], stream=True)))
        flush = asyncio.ensure_future(service.flush_cache())
        await settle()
        transport.emit(EngineDied("out of memory"))
        for waiting in (task, flush):
            with pytest.raises(EngineFailed, match="out of memory"):
                await waiting
        with pytest.raises(EngineFailed):
            await service.submit([request()], stream=True)
        await service.failed.wait()
        assert service.failure == "out of memory"

    run(test)


@pytest.mark.parametrize("is_good", [True, False])
def test_draining_waits_for_a_grammar_and_its_request(is_good: bool) -> None:
    async def test() -> None:
        service, transport = await opened()
        submitted = asyncio.ensure_future(service.submit([request(regex="a")], stream=False))
        await settle()
        assert not await service.drain(0.01)
        call = transport.sent[0].call
        transport.emit(GrammarCompiled(call) if is_good else Refused(call, "it is bad", "regex"))
        drained = asyncio.ensure_future(service.drain(5))
        await settle()
        assert drained.done() != is_good
        if is_good:
            [key] = transport.keys()
            transport.emit(StepOutput([key], [A], finished=[Finished(key, FinishReason("length"))]))
            await submitted
        else:
            with pytest.raises(InvalidParameter, match="it is bad"):
                await submitted
        assert await drained

    run(test)


def test_draining_waits_for_what_runs() -> None:
    async def test() -> None:
        service, transport = await opened()
        task = asyncio.ensure_future(collect(await service.submit([request()], stream=False)))
        await settle()
        assert not await service.drain(0.01)
        with pytest.raises(ServiceUnavailable):
            await service.submit([request()], stream=False)
        drained = asyncio.ensure_future(service.drain(5))
        [key] = transport.keys()
        transport.emit(StepOutput([key], [A], finished=[Finished(key, FinishReason("length"))]))
        assert await drained
        await task

    run(test)


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (GenerationRequest([], SamplingParams()), "prompt", "empty"),
        (request(512), "prompt", "512"),
        (request(-1), "prompt", "-1"),
        (request(*[ONCE] * 512), "prompt", "512 tokens"),
        (request(*[ONCE] * 500, max_tokens=13), "prompt", "500 .*max_tokens .*13.* 512"),
        (request(*[ONCE] * 500, min_tokens=13), "min_tokens", "12 tokens"),
        (request(temperature=-1), "temperature", "-1"),
        (request(top_k=-2), "top_k", "-2"),
    ],
)
def test_what_is_refused(asked: GenerationRequest, param: str, message: str) -> None:
    async def test() -> None:
        service, transport = await opened()
        with pytest.raises(InvalidParameter, match=message) as raised:
            await service.submit([request(), asked], stream=False)
        assert raised.value.param == param
        assert transport.sent == []  # all or nothing

    run(test)


def test_what_is_refused_is_told_in_the_requests_own_words() -> None:
    async def test() -> None:
        service, _ = await opened()
        names = {"prompt": "messages", "max_tokens": "max_completion_tokens"}
        asked = GenerationRequest([ONCE] * 500, SamplingParams(max_tokens=13), "max_tokens 1", names=names)
        with pytest.raises(InvalidParameter, match=r"500 .*max_completion_tokens .*13.* 512") as raised:
            await service.submit([asked], stream=False)
        assert raised.value.param == "messages"
        running = GenerationRequest([ONCE], SamplingParams(max_tokens=13), "max_tokens 1", names=names)
        await service.submit([running], stream=False)
        with pytest.raises(InvalidParameter, match=r"\bmax_tokens 1\b"):
            await service.submit([running], stream=False)

    run(test)


def test_a_generation_needs_no_service_but_a_way_to_drop_keys() -> None:
    async def test() -> None:
        dropped: list[tuple[list[int], str]] = []
        asked = [request(ONCE, stop=("on a",)), request(ONCE)]
        generation = Generation(asked, True, lambda keys, outcome: dropped.append(([*keys], outcome)))
        for key, each in enumerate(asked):
            detokenizer = Detokenizer(STORIES, each.prompt_ids, each.params)
            generation.open.append(Choice(key, key, 0, generation, each, detokenizer, 1, 0.0))
        updates = generation.updates()
        for choice in generation.open:
            choice.tokens += [UPON, A]
        generation.wake.set()
        stopped, running = await anext(updates)
        assert (stopped.text, stopped.finish) == (" up", FinishReason("stop", "on a"))
        assert (running.text, running.finish) == (" upon a", None)
        assert dropped == [([0], "stop")]
        await updates.aclose()
        assert dropped == [([0], "stop"), ([1], "abort")]

    run(test)


@pytest.mark.parametrize(
    ("ignore_eos", "own_stops", "sent"), [(False, (), (3,)), (False, (9,), (9, 3)), (True, (9,), (9,)), (True, (), ())]
)
def test_the_tokenizers_own_ends_stop_an_answer_unless_eos_is_ignored(ignore_eos, own_stops, sent) -> None:
    """The engine knows 2 already; ids that the model lacks cannot end anything."""

    async def check() -> None:
        service, transport = await opened()
        service.tokenizer = load_tokenizer(STORIES_FOLDER)
        service.tokenizer.end_ids = (2, 3, 512)
        params = SamplingParams(max_tokens=4, ignore_eos=ignore_eos, stop_token_ids=own_stops)
        await service.submit([GenerationRequest([5], params)], stream=False)
        assert transport.sent[-1].params.stop_token_ids == sent

    asyncio.run(check())


def test_a_trainer_s_call_whose_caller_goes_away_is_no_work_of_the_engine_and_takes_effect() -> None:
    async def test() -> None:
        service, transport = await opened()
        call = asyncio.create_task(service.trainer.update("/other", weight_version="two"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        [sent] = transport.sent
        assert isinstance(sent, UpdateWeights)
        assert not service._has_work()  # reading may take longer than any step
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (service.trainer.num_calls, service._has_work()) == (1, False)
        transport.emit(StateChanged(sent.call, "done", 1, holds=True, weights=("/other", "two")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (service.trainer.model_path, service.trainer.weight_version) == ("/other", "two")
        await service.submit([request()], stream=False)
        assert not service._has_work()  # its request waits for the trainer
        with pytest.raises(ServiceUnavailable, match="paused"):
            await service.probe(1)
        transport.emit(StateChanged(99, "done"))
        assert service._has_work()
        assert service.trainer.num_calls == 0

    run(test)
