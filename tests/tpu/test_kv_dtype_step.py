"""Steps with a KV cache of eight bits as a TPU would run them: the pool is held so, changes in place, and is nowhere wide."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

from sgl_jax.engine.kv_cache import with_kv_dtype
from sgl_jax.planning.model import find_model
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(600),
]

CASES = [  # model, topology, --kv-cache-dtype, the pool's dtype, tokens of the step
    ("Qwen3-8B", "v6e-4", "int8", "s8", 128),
    ("Qwen3-8B", "v7x-1", "fp8_e4m3", "f8e4m3fn", 128),
    ("DeepSeek-V3", "v6e-8", "int8", "s8", 16),
]
VOCABULARY = 16384  # a smaller head compiles sooner


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> tuple[StepProgram, str]:
    """The program, and the dtype that its pool is to have."""
    name, topology, option, dtype, tokens = request.param
    args = ServerArgs(model_path=name, attention_backend="fa", kv_cache_dtype=option)
    model = find_model(args)
    kinds = {"moe_layers": (False, False)} if model.config.moe_layers else {}
    config = dataclasses.replace(model.config, num_layers=2, vocab_size=VOCABULARY, **kinds)
    model = dataclasses.replace(model, config=with_kv_dtype(args, config))
    plan, made, placement = programs.programs_for(args, model, topology)
    bucket = next(each.bucket for each in plan.steps if each.bucket.num_tokens == tokens)
    return programs.compiled(plan, bucket, made[step_name(bucket)], placement), dtype


def test_the_pool_has_eight_bits_and_changes_in_place(case: tuple[StepProgram, str]) -> None:
    step, dtype = case
    pools = [
        array
        for each in step.module.computations[step.module.entry]
        if each.opcode == "parameter"
        for array in each.arrays
        if array.size in step.pool_sizes
    ]
    assert [pool.dtype for pool in pools] == [dtype]
    assert [output for output, _ in step.module.aliased] == list(range(step.donated_leaves()))
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_what_a_step_needs_besides_is_small(case: tuple[StepProgram, str]) -> None:
    """A wide copy of the pool would be twice its bytes."""
    step, _ = case
    assert step.temp_bytes < programs.TEMP_FRACTION * step.pool_bytes


def test_the_plan_knows_what_the_program_is_given(case: tuple[StepProgram, str]) -> None:
    step, _ = case
    given, _ = programs.planned_bytes(step)
    assert step.argument_bytes == pytest.approx(given, rel=programs.AGREEMENT)
