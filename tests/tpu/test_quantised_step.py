"""Steps of quantised models as a TPU would run them: matrices are read in their narrow dtype, and are nowhere wide.

Two layers have every shape of the model: a dense one and one of experts, where there are both.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

from sgl_jax.models.quantised import Quantised, is_quantised
from sgl_jax.models.scaled import Scaled
from sgl_jax.planning.model import find_model
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(600),
]

SCHEMES = {
    "int8": Scaled("int8"),
    "W4A16": Scaled("int4", group=128),
    "FP8 blocks": Scaled("float8_e4m3fn", group=128),
}
CASES = [  # model, topology, scheme, tokens of the step: none is a number of groups
    ("Qwen3-8B", "v6e-1", "int8", 24),
    ("Qwen3-8B", "v7x-1", "W4A16", 24),
    ("Qwen3-8B", "v6e-1", "W4A16", 2048),
    ("Qwen3-32B", "v6e-4", "int8", 24),
    ("Qwen3-32B", "v7x-1", "FP8 blocks", 24),
    ("Qwen3-30B-A3B", "v6e-1", "W4A16", 24),
    ("Qwen3-30B-A3B", "v7x-1", "int8", 24),
    ("DeepSeek-V3", "v6e-8", "FP8 blocks", 24),
    ("DeepSeek-V3", "v7x-4", "FP8 blocks", 24),
]
VOCABULARY = 16384  # a smaller head compiles sooner
WIDE = ("bf16", "f16", "f32")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def step(request: pytest.FixtureRequest) -> StepProgram:
    name, topology, scheme, tokens = request.param
    args = ServerArgs(model_path=name, attention_backend="fa", max_running_requests=24)
    model = find_model(args)
    kinds = {"moe_layers": (False, True)} if model.config.moe_layers else {}
    config = dataclasses.replace(
        model.config, num_layers=2, vocab_size=VOCABULARY, weight_scheme=SCHEMES[scheme], **kinds
    )
    plan, made, placement = programs.programs_for(args, dataclasses.replace(model, config=config), topology)
    bucket = next(each.bucket for each in plan.steps if each.bucket.num_tokens == tokens)
    return programs.compiled(plan, bucket, made[step_name(bucket)], placement)


def _matrices(step: StepProgram) -> set[tuple[int, ...]]:
    """Sides of each quantised matrix on a device; those of one expert, and of all."""
    leaves = [leaf for leaf in jax.tree.leaves(step.args[0], is_leaf=is_quantised) if isinstance(leaf, Quantised)]
    shapes = [leaf.values.sharding.shard_shape(leaf.values.shape) for leaf in leaves]
    return {programs.sides(shape[first:]) for shape in shapes for first in range(len(shape) - 1)}


@pytest.mark.supports("quantised on TPU, compiled only", CASES)
def test_no_buffer_has_a_matrix_in_a_wide_dtype(step: StepProgram) -> None:
    """A prefetch of a plain matrix with the same sides is none."""
    matrices = _matrices(step)
    assert matrices
    made = [each for each in step.module.instructions() if not each.opcode.endswith(("-start", "-done"))]
    wide = [(each.name, array) for each in made for array in each.arrays if array.dtype in WIDE]
    assert [(name, array) for name, array in wide if programs.sides(array.shape) in matrices] == []


def test_planes_are_read_where_they_lie(step: StepProgram) -> None:
    assert programs.weight_moves(step) == []


def test_what_a_step_needs_besides_is_small(step: StepProgram) -> None:
    assert step.temp_bytes < programs.TEMP_FRACTION * step.pool_bytes


def test_the_plan_knows_what_the_program_is_given(step: StepProgram) -> None:
    given, _ = programs.planned_bytes(step)
    assert step.argument_bytes == pytest.approx(given, rel=programs.AGREEMENT)
