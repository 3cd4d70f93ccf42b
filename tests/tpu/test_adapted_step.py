"""Steps with adapters as a TPU would run them: the slots are read where they lie, and nothing more goes over the links."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import jax
import pytest
import tpu_programs as programs

from sgl_jax.planning.model import find_model
from sgl_jax.runtime.adapter_arrays import LOAD_ADAPTER
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(600),
]
LAYERS, VOCABULARY = 2, 16384
CASES = [("v6e-4", 64, 16), ("v7x-1", 16, 16)]  # topology, rank, tokens of the step


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def launch(request: pytest.FixtureRequest):
    """Qwen3-8B with some of its layers, with and without 8 slots."""
    topology, rank, tokens = request.param
    made = []
    for options in ({}, {"enable_lora": True, "max_loras_per_batch": 8, "max_lora_rank": rank}):
        args = ServerArgs(model_path="Qwen3-8B", attention_backend="fa", **options)
        model = find_model(args)
        config = dataclasses.replace(model.config, num_layers=LAYERS, vocab_size=VOCABULARY)
        made.append(programs.programs_for(args, dataclasses.replace(model, config=config), topology))
    return *made, tokens


def step(plan, found, placement, tokens: int):
    bucket = next(each.bucket for each in plan.steps if each.bucket.num_tokens == tokens)
    return programs.compiled(plan, bucket, found[step_name(bucket)], placement)


def test_the_slots_are_all_that_is_added(launch) -> None:
    base, adapted = (step(*each, launch[-1]) for each in launch[:-1])
    slots = jax.tree.leaves(adapted.args[1])
    nbytes = sum(each.dtype.itemsize * _size(each.sharding.shard_shape(each.shape)) for each in slots)
    assert nbytes == adapted.plan.launch.adapter_bytes > 0
    added = adapted.argument_bytes - base.argument_bytes - (adapted.pool_bytes - base.pool_bytes)
    assert abs(added - nbytes) <= 0.02 * nbytes + 4096
    sums = [[each for each in found.module.collectives() if not each.in_branch] for found in (base, adapted)]
    assert len(sums[1]) == len(sums[0])
    assert sum(each.nbytes for each in sums[1]) == sum(each.nbytes for each in sums[0])
    assert programs.weight_moves(adapted) == []
    a_layer = nbytes // LAYERS  # slots that are on their way to the processor while others are used
    assert adapted.temp_bytes - base.temp_bytes <= a_layer + 8 * adapted.activation_bytes


def test_an_adapter_is_put_into_its_slot_in_place(launch) -> None:
    plan, found, placement = launch[1]
    bucket = plan.steps[0].bucket
    load = programs.compiled(plan, bucket, found[LOAD_ADAPTER], placement)
    assert load.aliased_bytes >= plan.launch.adapter_bytes
    assert load.temp_bytes <= 0.2 * plan.launch.adapter_bytes


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
