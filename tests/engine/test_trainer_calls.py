"""Calls of a trainer in the engine: no request is lost, and every token is that of the weights in use when it was sampled.

The fake device mixes the number of its weights into all KV, so KV of other weights gives wrong tokens.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fakes.fake_arrays import FakeArrays
from fakes.fake_runner import kv_chain, token_of
from messages import says
from sgl_jax.engine.messages import (
    Abort,
    ContinueGeneration,
    Event,
    FlushCache,
    PauseGeneration,
    Refused,
    ReleaseMemory,
    ResumeMemory,
    StateChanged,
    StepOutput,
    UpdateWeights,
)
from sgl_jax.engine.trainer_calls import TrainerCall
from simulated import Client, make_core

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
MODES = ("abort", "retract", "in_place")
BOTH = ["kv_cache", "weights"]


class Trainer(Client):
    """Client that notes the weights of each token."""

    def __init__(self, *, waits: bool = False, **options) -> None:
        self.arrays = FakeArrays(waits)
        super().__init__(make_core(arrays=self.arrays, vocab_size=64, eos=63, **options))
        self.weights = 0
        self.weights_of: dict[int, list[int]] = {}
        self.num_calls = 0

    def _take(self, event: Event) -> None:
        super()._take(event)
        if isinstance(event, StateChanged) and event.weights is not None:
            self.weights = int(event.weights[0])
        if isinstance(event, StepOutput):
            for key in event.keys:
                self.weights_of.setdefault(key, []).append(self.weights)

    def send(self, call: type[TrainerCall], *args: object) -> None:
        self.num_calls += 1
        self.core.handle(call(self.num_calls, *args))

    def call(self, call: type[TrainerCall], *args: object) -> StateChanged | Refused:
        """Send a call and return its answer."""
        self.send(call, *args)
        for _ in range(1000):
            if self.said:
                said = self.said.pop()
                assert isinstance(said, StateChanged | Refused)
                assert said.call == self.num_calls
                return said
            self.step()
        raise AssertionError("no answer")

    def ask(self, key: int, prompt: list[int] = PROMPT, **params) -> None:
        self.submit(key, prompt, **{"max_tokens": 20, "ignore_eos": True, "temperature": 0.0} | params)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def check(self) -> None:
        """Check that every request ended, whole unless it was aborted, with the tokens of the weights of their time."""
        for key, answer in self.answers.items():
            request, tokens = answer.request, answer.tokens
            assert answer.reason is not None, "never finished"
            assert answer.reason.type == "abort" or len(tokens) == request.params.max_tokens
            for i, (token, weights) in enumerate(zip(tokens, self.weights_of.get(key, []), strict=True)):
                kv = kv_chain([*request.prompt.tolist(), *tokens[:i]], weights)
                right = token_of(kv, 64, temperature=request.params.temperature, seed=request.seed)
                assert token == right, f"token {i} of request {key} with weights {weights}"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_computed_during_a_pause_and_all_is_right_after_it(mode: str) -> None:
    trainer = Trainer()
    for key in range(1, 7):  # two of them wait
        trainer.ask(key)
    trainer.steps(5)
    said = trainer.call(PauseGeneration, mode)
    assert (said.holds, said.num_waiting) == (True, 0 if mode == "abort" else 6)
    trainer.run()
    trainer.ask(7)
    num_steps = len(trainer.core.runner.plans)
    trainer.run()
    assert not trainer.core.busy  # the loop sleeps
    assert len(trainer.core.runner.plans) == num_steps
    assert trainer.core.scheduler.num_running == (4 if mode == "in_place" else 0)
    said = trainer.call(ContinueGeneration)
    assert (said.holds, said.num_waiting) == (False, 0)
    trainer.run()
    trainer.check()
    ended = {key: answer.reason.type for key, answer in trainer.answers.items()}
    assert ended == {**dict.fromkeys(range(1, 7), "abort" if mode == "abort" else "length"), 7: "length"}


def test_pausing_and_going_on_may_be_repeated() -> None:
    trainer = Trainer()
    assert not trainer.call(ContinueGeneration).holds
    for mode in MODES:
        assert trainer.call(PauseGeneration, mode).holds
    trainer.ask(1)
    assert trainer.call(PauseGeneration, "retract").num_waiting == 1
    trainer.core.handle(FlushCache(9))
    trainer.core.handle(Abort([1]))
    trainer.run()
    assert len(trainer.flushed) == 1
    assert trainer.answers[1].reason.type == "abort"
    assert not trainer.call(ContinueGeneration).holds
    assert not trainer.call(ContinueGeneration).holds


def test_calls_are_carried_out_in_their_order() -> None:
    trainer = Trainer()
    trainer.ask(1)
    trainer.steps(3)
    for call, *args in (
        (PauseGeneration, "retract"),
        (ReleaseMemory, BOTH),
        (ResumeMemory, BOTH),
        (ContinueGeneration,),
    ):
        trainer.send(call, *args)
    trainer.run()
    assert [said.call for said in trainer.said] == [1, 2, 3, 4]
    assert [said.holds for said in trainer.said] == [True, True, True, False]
    trainer.check()


@pytest.mark.parametrize("width", [1, 3])
def test_weights_change_under_load_and_no_cached_prefix_stays(width: int) -> None:
    trainer = Trainer(waits=True, width=lambda num: width)
    for key in range(1, 7):
        trainer.ask(key, [key, *PROMPT])
    trainer.steps(4)
    trainer.send(UpdateWeights, "7", "auto", False, "seven")
    before = trainer.core.scheduler.counters.steps
    trainer.steps(2)
    assert trainer.core.scheduler.counters.steps == before + 2  # requests run while weights are read
    assert trainer.said == []
    trainer.arrays.finish()
    while not trainer.said:
        trainer.step()
    assert trainer.said.pop() == StateChanged(1, "The weights are those of 7.", weights=("7", "seven"))
    trainer.run()
    trainer.check()
    assert {0, 7} <= {*trainer.weights_of[1]}
    trainer.ask(8, [1, *PROMPT])
    trainer.run()
    trainer.check()
    assert trainer.answers[8].tokens != trainer.answers[1].tokens


def test_an_update_may_end_the_requests() -> None:
    trainer = Trainer()
    trainer.ask(1)
    trainer.steps(4)
    assert trainer.call(UpdateWeights, "7", "auto", True).weights == ("7", "")
    trainer.run()
    assert trainer.answers[1].reason.type == "abort"
    trainer.check()


def test_weights_that_do_not_fit_change_nothing() -> None:
    trainer = Trainer(waits=True)
    trainer.ask(1)
    trainer.steps(2)
    for path, message in (("bad", "model_path is bad … bad is bad"), ("odd", "model_path is odd … RuntimeError")):
        trainer.send(UpdateWeights, path)
        trainer.send(UpdateWeights, "7")  # one at a time
        trainer.step()
        said = trainer.said.pop()
        assert (said.call, said.param) == (trainer.num_calls, "")
        assert says(said.message, "other weights are being read … wait")
        trainer.arrays.finish()
        trainer.steps(2)
        said = trainer.said.pop()
        assert (said.call, said.param) == (trainer.num_calls - 1, "model_path")
        assert says(said.message, message)
    trainer.run()
    trainer.check()
    assert {*trainer.weights_of[1]} == {0}


def test_memory_is_released_when_no_request_runs() -> None:
    trainer = Trainer()
    trainer.ask(1)
    trainer.steps(3)
    said = trainer.call(ReleaseMemory, BOTH)
    assert isinstance(said, Refused)
    assert says(said.message, "1 requests are live … abort or retract")
    assert trainer.call(PauseGeneration, "in_place").num_waiting == 1
    assert isinstance(trainer.call(ReleaseMemory, BOTH), Refused)
    trainer.call(PauseGeneration, "retract")
    assert trainer.call(ReleaseMemory, ["kv_cache"]).message == "Released: kv_cache."
    assert trainer.call(ReleaseMemory, BOTH).message == "Released: kv_cache, weights."
    said = trainer.call(ContinueGeneration)
    assert said.holds
    assert says(said.message, "released memory")
    trainer.ask(2)
    trainer.run()
    assert trainer.call(UpdateWeights, "7").holds
    assert trainer.call(ResumeMemory, ["weights"]).holds
    said = trainer.call(ResumeMemory, BOTH)
    assert (said.holds, said.message) == (False, "Released: nothing.")
    trainer.run()
    trainer.check()
    assert {*trainer.weights_of[2]} == {7}
    assert trainer.core.scheduler.num_pages == trainer.core.scheduler.caches[0].num_available_pages


def test_an_engine_without_its_arrays_refuses_by_name() -> None:
    client = Client(make_core())
    for call in (UpdateWeights(1, "7"), ReleaseMemory(1, BOTH), ResumeMemory(1, BOTH)):
        client.core.handle(call)
        client.run()
        assert client.said.pop() == Refused(1, "this engine cannot exchange its arrays")
    client.core.handle(PauseGeneration(2))
    client.run()
    assert client.said.pop().holds


CALLS = st.one_of(
    st.tuples(st.just(PauseGeneration), st.sampled_from(MODES)),
    st.tuples(st.just(ContinueGeneration)),
    st.tuples(st.just(UpdateWeights), st.integers(1, 9).map(str), st.just("auto"), st.booleans()),
    st.tuples(st.just(ReleaseMemory), st.sampled_from([BOTH, BOTH[:1], BOTH[1:]])),
    st.tuples(st.just(ResumeMemory), st.sampled_from([BOTH, BOTH[:1], BOTH[1:]])),
)


@given(data=st.data())
@settings(max_examples=60)
def test_whatever_comes_every_request_is_answered(data: st.DataObject) -> None:
    draw = data.draw
    width, options = draw(st.sampled_from([1, 3])), {"num_usable_pages": 24}
    trainer = Trainer(
        width=lambda num: width, overlap=draw(st.booleans()), ranks=draw(st.sampled_from([1, 2])), **options
    )
    for key in range(1, draw(st.integers(4, 12))):
        if draw(st.booleans()):
            call, *args = draw(CALLS)
            trainer.send(call, *args)
        prompt = [*range(1, draw(st.integers(2, 12)))]
        trainer.ask(key, prompt, max_tokens=draw(st.integers(1, 16)), temperature=draw(st.sampled_from([0.0, 1.0])))
        trainer.steps(draw(st.integers(0, 6)))
    trainer.send(ResumeMemory, BOTH)
    trainer.send(ContinueGeneration)
    trainer.run()
    trainer.check()
    assert {said.call for said in trainer.said} == {*range(1, trainer.num_calls + 1)}
