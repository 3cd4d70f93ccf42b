"""The step as a TPU would run it: compiled by libtpu for chips that are not here, and read.

Default launches of real models, with all their layers: 36 take little longer to compile than one.
"""

from __future__ import annotations

import importlib.util

import jax
import pytest
import tpu_programs as programs
from tpu_programs import StepProgram

from sgl_jax.planning.step_time import step_time

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(1200),  # a program takes half a minute of one core, and machines are busy
]

CASES = [
    ("Qwen3-8B", "v6e-4", "fa", 128),
    ("Qwen3-8B", "v6e-4", "fa", 2048),
    ("Qwen3-8B", "v6e-1", "fa", 128),
    ("Llama-3.1-8B", "v6e-1", "fa", 2048),
    ("Qwen3-8B", "v7x-4", "fa", 1024),
    ("Llama-3.1-8B", "v6e-1", "native", 512),
    ("Llama-3.1-8B", "v7x-1", "fa", 128),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def step(request: pytest.FixtureRequest) -> StepProgram:
    return programs.step_program(*request.param)


@pytest.mark.supports("TPU, compiled only", CASES)
def test_pool_and_state_change_in_place(step: StepProgram) -> None:
    donated = range(step.donated_leaves())
    assert [output for output, _ in step.module.aliased] == list(donated)
    assert step.aliased_bytes >= step.pool_bytes
    assert programs.pool_copies(step) == []


def test_what_a_step_needs_besides_is_small(step: StepProgram) -> None:
    assert step.temp_bytes < programs.TEMP_FRACTION * step.pool_bytes


def test_the_plan_agrees_with_the_program(step: StepProgram) -> None:
    """Compare the arithmetic of `sgl_jax.compile --plan` with the compiled program."""
    given, reduced = programs.planned_bytes(step)
    assert step.argument_bytes == pytest.approx(given, rel=programs.AGREEMENT)
    summed = programs.sums(step)[0] * step.activation_bytes
    assert summed == pytest.approx(reduced, rel=programs.AGREEMENT)


def test_no_matrix_is_copied_on_its_way_to_its_product(step: StepProgram) -> None:
    assert programs.weight_moves(step) == []


def test_a_layer_has_four_products_with_weights(step: StepProgram) -> None:
    assert programs.products(step) == programs.expected_products(step)


def test_a_layer_sums_twice_over_the_devices(step: StepProgram) -> None:
    activations, others = programs.sums(step)
    assert activations == (2 * step.num_layers + 1 if step.plan.target.num_devices > 1 else 0)  # and the embedding
    assert sum(others) <= programs.SMALL


def test_parts_are_multiplied_while_others_are_exchanged(step: StepProgram, request: pytest.FixtureRequest) -> None:
    """The program starts a collective of one part and finishes it behind products of another."""
    topology, devices = step.plan.target.topology, step.plan.target.num_devices
    assert topology is not None
    time = step_time(step.module, topology, devices)
    assert (step.bucket.num_parts > 1) == (devices > 1 and step.bucket.num_tokens >= 1024)
    # Each part of a layer has the kernel for chunks, and the first one that for short rows.
    attention = [each.name for each in step.module.instructions() if each.name.startswith(("fa_decode", "fa_chunks"))]
    has_kernels = request.node.callspec.params["step"][2] == "fa"
    assert len(attention) == (step.bucket.num_parts + 1) * step.num_layers * has_kernels
    if step.bucket.num_parts > 1:
        # A v7x multiplies in less time than the sums take.
        assert time.waited < time.exchanged * (0.35 if topology.name.startswith("v6e") else 0.5)
    else:  # but what a v7x finds to do meanwhile
        assert time.waited >= 0.9 * time.exchanged


def test_logits_stay_where_they_are(step: StepProgram) -> None:
    vocabulary = step.plan.model.config.vocab_size // step.plan.target.num_devices
    assert programs.largest_gathered_axis(step) < vocabulary // 16


def test_the_host_sends_one_array(step: StepProgram) -> None:
    (vector,) = jax.tree.leaves(step.args[4:])
    assert (vector.ndim, vector.dtype.name) == (1, "int32")
