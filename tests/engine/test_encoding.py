"""Vectors from the service, of an engine that makes them by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.fake_core import FakeCore, fake_info, fake_vector
from fakes.fake_engine import FakeEngine
from sgl_jax.engine.encoding import Encoded, EncodeRequest
from sgl_jax.engine.generation import Conflict, GenerationRequest, NotFinite, PromptTooLong, QueueFull
from sgl_jax.engine.messages import Abort, Command, Event, Generate, Pooled, PoolingInfo, StepOutput
from sgl_jax.request import InvalidParameter, SamplingParams
from sgl_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(str(Path(__file__).parents[1] / "data" / "stories260k"))
EMBEDS = PoolingInfo("embed", 5, normalize=True)


def engine(pooling: PoolingInfo | None = EMBEDS, step_seconds: float = 0.0) -> tuple[FakeEngine, FakeCore]:
    core = FakeCore(fake_info(pooling=pooling), step_seconds)
    return FakeEngine(lambda: core, TOKENIZER), core


def encode(engine: FakeEngine, *requests: EncodeRequest) -> list[Encoded]:
    return engine._call(engine._service.encode(requests))


def test_each_prompt_gets_its_vector_and_its_numbers_of_tokens() -> None:
    prompts = [[7], [3, 4, 5], [3, 4, 5], list(range(40))]
    made, _ = engine()
    with made:
        found = encode(made, *map(EncodeRequest, prompts))
        assert [each.vector.tolist() for each in found] == [fake_vector(ids, 5) for ids in prompts]
        assert {each.vector.dtype for each in found} == {np.dtype(np.float32)}
        assert [each.num_prompt_tokens for each in found] == [1, 3, 3, 40]
        assert [each.num_cached_tokens for each in found] == [0, 0, 2, 0]
        assert encode(made) == []


def test_errors_name_the_input() -> None:
    made, core = engine()
    with made:
        with pytest.raises(InvalidParameter, match=r"input\[1\] is empty") as empty:
            encode(made, EncodeRequest([1]), EncodeRequest([]))
        assert empty.value.param == "input[1]"
        with pytest.raises(PromptTooLong, match=r"513 tokens; this model's maximum context length is 512 tokens$"):
            encode(made, EncodeRequest([1] * 513))
        with pytest.raises(InvalidParameter, match=r"documents\[3\] has token id 512"):
            encode(made, EncodeRequest([512], name="documents[3]"))
        assert core.commands == []
        assert len(encode(made, EncodeRequest([1] * 512))) == 1


def test_text_and_vectors_are_refused_where_they_are_not_made() -> None:
    pooling, _ = engine()
    with pooling, pytest.raises(InvalidParameter, match=r"--task embed.*--task generate") as error:
        pooling._call(pooling._service.submit([GenerationRequest([1], SamplingParams())], stream=False))
    assert error.value.param == "model"
    generating, _ = engine(None)
    with generating, pytest.raises(InvalidParameter, match="--task embed") as error:
        encode(generating, EncodeRequest([1]))
    assert error.value.param == "model"


def test_a_full_queue_takes_none_of_them() -> None:
    made, core = engine()
    made._service._max_queued = 2
    with made:
        with pytest.raises((QueueFull, InvalidParameter), match="3"):
            encode(made, *[EncodeRequest([1])] * 3)
        assert core.commands == []


def test_a_cancelled_call_aborts_its_requests() -> None:
    made, core = engine(step_seconds=0.3)
    with made:

        async def cancelled() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(made._service.encode([EncodeRequest([1]), EncodeRequest([2])]), 0.05)

        made._call(cancelled())
        assert made._service.num_live == 0
    assert sum(len(command.keys) for command in core.commands if isinstance(command, Abort)) == 2


def test_a_request_that_is_aborted_by_its_id_ends_with_a_conflict() -> None:
    class Ended(FakeCore):
        """Ends each request before it has a vector."""

        def handle(self, command: Command) -> None:
            super().handle(command)
            if isinstance(command, Generate):
                super().handle(Abort([command.key]))

    with FakeEngine(lambda: Ended(fake_info(pooling=EMBEDS)), TOKENIZER) as made:

        async def aborted() -> None:
            running = asyncio.ensure_future(made._service.encode([EncodeRequest([1], request_id="one")]))
            with pytest.raises(Conflict, match="one"):
                await running

        made._call(aborted())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_an_error_of_its_input(value: float, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeCore):
        """Makes values that are no finite numbers of prompts that begin with 9."""

        def step(self) -> list[Event]:
            events = super().step()
            for each in events:
                if isinstance(each, StepOutput):
                    each.pooled[:] = [Pooled(one.key, self._broken(one.vector)) for one in each.pooled]
            return events

        def _broken(self, vector: bytes) -> bytes:
            generated = [each for each in self.commands if isinstance(each, Generate)]
            return np.array([1, value, 2, 3, value], "<f4").tobytes() if generated[-1].prompt_ids[0] == 9 else vector

    with FakeEngine(lambda: Broken(fake_info(pooling=EMBEDS)), TOKENIZER) as made:
        with pytest.raises(NotFinite, match=r"2 of the 5 values .* texts\[4\]") as error:
            encode(made, EncodeRequest([9], name="texts[4]"))
        assert error.value.param == "texts[4]"
        assert any("texts[4]" in line for line in caplog.messages)
        assert len(encode(made, EncodeRequest([1]))) == 1


def test_vectors_count_as_stopped_in_the_metrics() -> None:
    made, _ = engine()
    with made:
        encode(made, EncodeRequest([1]), EncodeRequest([2]))
        assert made._service.metrics.finished == {"stop": 2}


@pytest.mark.parametrize("dimensions", ["4", 2.0, True, 0, 6])
def test_dimensions_that_are_no_number_of_values_are_refused_before_anything_is_computed(dimensions: Any) -> None:
    made, core = engine()
    with made:
        with pytest.raises(InvalidParameter, match=f"dimensions is {dimensions!r}") as error:
            made.encode("a", dimensions=dimensions)
        assert error.value.param == "dimensions"
        assert core.commands == []
        found = made.encode(input_ids=[1], dimensions=np.int64(4))  # pyrefly: ignore[bad-argument-type]
        assert isinstance(found, dict)
        assert len(found["embedding"]) == 4


def test_errors_in_a_program_name_the_argument() -> None:
    made, core = engine()
    with made:
        wrong: list[tuple[Any, str]] = [
            ("", "prompt"),
            (["a", ""], "prompt[1]"),
            ([], "prompt"),
            (None, "prompt"),
            (7, "prompt"),
            ([7], "prompt"),
            ("\ud800", "prompt"),
            ("word " * 5000, "prompt"),
            (["a", "word " * 150 * 4], "prompt[1]"),
        ]
        for prompt, name in wrong:
            with pytest.raises(InvalidParameter) as error:
                made.encode(prompt)
            assert error.value.param in (name, "prompt")
            assert name in str(error.value) or "too long" in str(error.value)
        assert core.commands == []


def test_a_priority_goes_to_the_engine() -> None:
    core = FakeCore(fake_info(pooling=EMBEDS, priority_sign=1))
    with FakeEngine(lambda: core, TOKENIZER) as made:
        made.encode("a", priority=7)
        assert core.commands[-1].params.priority == 7
        with pytest.raises(InvalidParameter, match="priority"):
            made.encode("a", priority=2**31)


def test_a_probe_makes_a_vector() -> None:
    made, core = engine()
    with made:
        made._call(made._service.probe(4))
    assert core.commands[0].params.max_tokens == 0
