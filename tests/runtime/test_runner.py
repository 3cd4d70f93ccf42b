"""Tests of the runner: its dispatches, announcements and results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runner import PAGE_SIZE, ROWS, small_core, small_runner

from sgl_jax.runtime import programs
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import Program
from sgl_jax.runtime.programs import OUTPUTS, STATE, step_name
from sgl_jax.runtime.runner import ModelRunner, by_need
from sgl_jax.step_plan import StepPlan
from simulated import Client


class Announced(list[tuple[str, str]]):
    """Announced programs and sources, in order."""

    def __call__(self, program: str, vector: np.ndarray, source: str) -> None:
        assert vector.dtype == np.int32
        self.append((program, source))


@pytest.fixture(scope="module")
def announced() -> Announced:
    return Announced()


@pytest.fixture(scope="module")
def runner(stories260k: Path, announced: Announced) -> ModelRunner:
    return small_runner(stories260k, announce=announced)


def test_a_start_announces_nothing(runner: ModelRunner, announced: Announced) -> None:
    """Every process warms up its own programs."""
    assert runner.compiles_after_ready == 0
    assert announced == []


def test_a_step_of_prefix_hits_is_two_dispatches_and_a_steady_one_is_one(
    runner: ModelRunner, announced: Announced
) -> None:
    client = Client(small_core(runner))
    prompt = [1, *range(10, 10 + 3 * PAGE_SIZE)]
    client.submit(0, prompt, max_tokens=1)
    client.run()
    for key in range(1, 1 + ROWS):
        client.submit(key, [*prompt, key], max_tokens=4, ignore_eos=True)
    announced.clear()
    client.run()
    steps = [name for name, _ in announced]
    assert steps == ["load pages"] + ["tokens=32 rows=4"] * 4
    assert [answer.prompt and answer.prompt.num_cached_tokens for answer in client.answers.values()][1:] == [12] * ROWS
    assert runner.compiles_after_ready == 0


def test_programs_compile_in_the_order_of_need() -> None:
    def order(*sizes: tuple[int, int]) -> list[list[str]]:
        buckets = [Bucket(tokens, 1, width) for tokens, width in sizes]
        steps = [Program(step_name(bucket), jax.jit(abs), (), gives=(STATE, OUTPUTS)) for bucket in buckets]
        divided = by_need([*steps, Program("load", jax.jit(abs), (), gives=(STATE,))], buckets)
        return [[each.name.replace(" rows=1", "").removeprefix("tokens=") for each in part] for part in divided]

    assert order((2, 1), (8, 1), (32, 1), (64, 1)) == [["2", "64", "load"], ["8", "32"]]
    assert order((2, 1), (8, 1)) == [["2", "8", "load"], []]
    assert order((2, 1)) == [["2", "load"], []]
    wide = order((2, 1), (4, 4), (8, 1), (16, 4), (64, 1), (64, 4))
    assert wide == [["4 width=4", "2", "64", "64 width=4", "load"], ["8", "16 width=4"]]


class LeftThere:
    """Device value that fails when it is copied to the host."""

    def __array__(self, *args, **kwargs) -> np.ndarray:
        raise AssertionError("brought to the host")


def test_the_host_fetches_only_the_tokens_of_a_step_of_width_one(runner: ModelRunner) -> None:
    flight = runner.launch(StepPlan.of(np.ones(2, np.int32)))
    others = {name: LeftThere() for name in flight.outputs._fields if name != "tokens"}
    step = dataclasses.replace(flight, outputs=flight.outputs._replace(**others)).collect()
    assert (step.tokens.shape, step.num_accepted.tolist(), step.num_drafted.tolist()) == ((2, 1), [1, 1], [0, 0])


def test_a_program_with_a_payload_is_announced_by_its_source_and_reads_it_itself(
    stories260k: Path, announced: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload, such as an adapter's weights, is no vector: every host reads its own copy of the file."""
    files = {"a.safetensors": jnp.full((2, 3), 5, jnp.int32), "b.safetensors": jnp.full((2, 3), 9, jnp.int32)}

    def put(state, vector, payload):
        table = jax.lax.dynamic_update_slice(state.page_table, payload, (vector[0], 0))
        return (dataclasses.replace(state, page_table=table),)

    make = programs.make_programs

    def with_one_more(*args):
        made = make(*args)
        state = next(program.args[0] for program in made if program.takes == (STATE,))
        vector = jax.ShapeDtypeStruct((1,), np.int32)
        args = state, vector, jax.ShapeDtypeStruct((2, 3), np.int32, sharding=state.length.sharding)
        more = Program("load files", jax.jit(put, donate_argnums=0), args, (STATE,), (STATE,), files.__getitem__)
        return [*made, more]

    monkeypatch.setattr(programs, "make_programs", with_one_more)
    told = Announced()
    leads, follows = small_runner(stories260k, announce=told), small_runner(stories260k)
    assert leads.run("load files", np.array([1], np.int32), "a.safetensors") is None
    assert told == [("load files", "a.safetensors")]
    files["a.safetensors"] = files["b.safetensors"]  # a file of the same name on another host
    follows.execute("load files", np.array([1], np.int32), "a.safetensors")
    for each, value in ((leads, 5), (follows, 9)):
        state = each._values[STATE]
        assert np.asarray(state.page_table)[:4, :4].tolist() == [
            [0] * 4,
            [value] * 3 + [0],
            [value] * 3 + [0],
            [0] * 4,
        ]
