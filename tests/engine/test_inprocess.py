"""sgl_jax.Engine: generating without a server. The fake core answers with the prompt itself, then eos."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sgl_jax
from fakes.fake_arrays import FakeArrays
from fakes.fake_core import FakeCore, fake_info
from fakes.fake_engine import FakeEngine
from fakes.fake_tracer import DEFAULT, UNWRITABLE
from messages import says
from sgl_jax.engine.engine import Engine
from sgl_jax.engine.generation import Conflict, EngineFailed, UnknownAdapter
from sgl_jax.request import InvalidParameter, SamplingParams
from sgl_jax.text.tokenizer import load_tokenizer
from simulated import make_core

STORIES = load_tokenizer(str(Path(__file__).parents[1] / "data" / "stories260k"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with FakeEngine(FakeCore, STORIES) as engine:
        yield engine


def test_one_prompt_one_answer(engine: Engine) -> None:
    answer = engine.generate("Once upon a time")
    assert answer["text"] == " Once upon a time"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}


def test_lists_and_parameters_of_each(engine: Engine) -> None:
    params = [{"max_new_tokens": 1}, SamplingParams(max_tokens=2)]
    answers = engine.generate(input_ids=[[5, 6, 7], np.array([8, 9, 10])], sampling_params=params)
    assert [answer["output_ids"] for answer in answers] == [[5], [8, 9]]
    assert engine.generate(["a"])[0]["text"] == " a"
    assert len(engine.generate("a", {"n": 3})) == 3


def test_streams_grow(engine: Engine) -> None:
    answers = list(engine.generate("Once upon", stream=True))
    assert answers[-1]["text"] == " Once upon"
    assert all(answer["output_ids"] == [1, 403, 407, 2][: len(answer["output_ids"])] for answer in answers)
    both = list(engine.generate(["Once", "upon"], stream=True))
    assert {answer["index"]: answer["text"] for answer in both} == {0: " Once", 1: " upon"}


def test_a_trainer_s_calls() -> None:
    with FakeEngine(lambda: make_core(arrays=FakeArrays(), eos=2, context_length=512), STORIES) as engine:

        def ids() -> list[int]:
            return engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 4, "temperature": 0})[
                "output_ids"
            ]

        old = ids()
        engine.update_weights_from_disk("7", "safetensors", weight_version="seven")
        new = ids()
        assert new != old
        for wrong in (
            {"model_path": "bad"},
            {"model_path": "7", "load_format": "pt"},
            {"model_path": "7", "flush_cache": False},
        ):
            with pytest.raises(InvalidParameter) as error:
                engine.update_weights_from_disk(**wrong)
            assert error.value.param == [*wrong][-1]
        with pytest.raises(InvalidParameter, match=r"mode .*'soft'.* abort, retract, in_place"):
            engine.pause_generation("soft")
        with pytest.raises(InvalidParameter, match=r"tags .*'cuda_graph'.* kv_cache, weights"):
            engine.release_memory_occupation(["cuda_graph"])
        assert engine.pause_generation("in_place").holds
        assert engine.release_memory_occupation().holds
        assert engine.resume_memory_occupation(["kv_cache", "weights"]).holds
        assert not engine.continue_generation().holds
        assert ids() == new


def test_adapters() -> None:
    with FakeEngine(lambda: FakeCore(fake_info(adapters=["tales"])), STORIES) as engine:
        params = {"max_new_tokens": 2}

        def ids(lora_path: str | list[str | None] | None) -> list[int]:
            return engine.generate(input_ids=[[5, 6]], sampling_params=params, lora_path=lora_path)[0]["output_ids"]

        assert (ids(None), ids("tales"), ids(["tales"])) == ([5, 6], [105, 106], [105, 106])
        new = engine.load_lora_adapter("new", "/new", pinned=True)
        assert (new.number, new.path, new.pinned) == (2, "/new", True)
        assert ids("new") == [205, 206]
        stream = engine.generate(input_ids=[5, 6], sampling_params=params, lora_path="new", stream=True)
        assert list(stream)[-1]["output_ids"] == [205, 206]
        again = asyncio.run(engine.async_generate(input_ids=[5, 6], sampling_params=params, lora_path="new"))
        assert again["output_ids"] == [205, 206]
        assert engine.unload_lora_adapter("new") == 2
        for name in ("new", ""):
            with pytest.raises(UnknownAdapter, match=f"lora_path is {name}; the adapters are tales"):
                ids(name)


def test_async(engine: Engine) -> None:
    async def test() -> None:
        answers = await asyncio.gather(*(engine.async_generate(input_ids=[i]) for i in range(5, 15)))
        assert [answer["output_ids"] for answer in answers] == [[i, 2] for i in range(5, 15)]
        last = None
        async for answer in await engine.async_generate("Once upon", stream=True):
            last = answer
        assert last is not None
        assert last["text"] == " Once upon"

    asyncio.run(test())


def test_leaving_a_stream_aborts_it() -> None:
    core = FakeCore(step_seconds=0.01)
    with FakeEngine(lambda: core, STORIES) as engine:
        next(engine.generate("Once", {"ignore_eos": True}, stream=True))
        for _ in range(100):
            if not core.busy:
                return
            threading.Event().wait(0.01)
        raise AssertionError("it still runs")


def test_flush_cache(engine: Engine) -> None:
    engine.generate("flush")
    assert engine.flush_cache() > 0
    assert engine.flush_cache() == 0


def test_profiles(engine: Engine) -> None:
    assert engine.start_profile("/traces", 3, host_tracer_level=1).running
    with pytest.raises(Conflict, match="profile is running"):
        engine.start_profile()
    engine.generate("Once upon a time")
    while (status := engine.profile_status()).running:
        pass
    assert status.steps_done == 3
    with pytest.raises(Conflict, match="no profile is running"):
        engine.stop_profile()
    engine.start_profile()
    assert engine.stop_profile().files == [f"{DEFAULT}/fake.xplane.pb"]
    with pytest.raises(InvalidParameter, match=f"output_dir .*{UNWRITABLE}.*Permission denied"):
        engine.start_profile(UNWRITABLE)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "input_ids": [1]}, "prompt"),
        ({"input_ids": "a"}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [True]}, "input_ids"),
        ({"prompt": "a", "sampling_params": 3}, "sampling_params"),
        ({"prompt": "a", "sampling_params": {"temperature": "hot"}}, "temperature"),
        ({"prompt": "a", "sampling_params": {"warmth": 1}}, "warmth"),
        ({"prompt": "a", "sampling_params": {"seed": 1, "sampling_seed": 1}}, "sampling_seed"),
        ({"prompt": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"prompt": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"prompt": "a", "top_logprobs_num": 1}, "top_logprobs_num"),
    ],
)
def test_wrong_calls_name_the_argument(engine: Engine, call: dict, param: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        engine.generate(**call)
    assert raised.value.param == param


def test_after_shutdown() -> None:
    engine = FakeEngine(FakeCore, STORIES)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineFailed, match="shut down"):
        engine.generate("a")


def test_a_core_that_cannot_be_built() -> None:
    def broken() -> FakeCore:
        raise ValueError("the model does not fit")

    before = set(threading.enumerate())
    with pytest.raises(EngineFailed, match="the model does not fit"):
        FakeEngine(broken, STORIES)
    for _ in range(100):  # the engine's thread is just leaving
        if set(threading.enumerate()) <= before:
            return
        threading.Event().wait(0.01)
    raise AssertionError("a thread was left behind")


def test_the_package_exports_it() -> None:
    assert issubclass(sgl_jax.Engine, Engine)
    assert sgl_jax.SamplingParams is SamplingParams


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("logging_is_set_up", [False, True])
def test_a_start_is_heard_on_a_terminal_unless_the_program_has_its_own_logging(
    monkeypatch: pytest.MonkeyPatch, logging_is_set_up: bool
) -> None:
    ours, screen = logging.getLogger("sgl_jax"), Screen()
    monkeypatch.setattr(ours, "propagate", logging_is_set_up)  # pytest has set up logging
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sgl_jax.engine.startup.build_core", lambda args, **_: FakeCore())
    level = ours.level
    with Engine(model_path=str(Path(__file__).parents[1] / "data" / "stories260k")) as engine:
        assert engine.generate("ab", {"max_new_tokens": 1})["meta_info"]["completion_tokens"] == 1
    pinned = [] if logging_is_set_up else [f"sgl_jax {sgl_jax.__version__}, starting", "Ready after 0.0 s"]
    said = screen.getvalue().splitlines()
    assert [says(line, each) for line, each in zip(said, pinned, strict=True)] == [True] * len(pinned)
    assert (ours.handlers, ours.level) == ([], level)
