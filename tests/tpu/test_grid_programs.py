"""Collectives of a step on several TPUs, counted in the compiled program, are no more than there must be.

Two layers of a real model: every further layer repeats them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter

import jax
import pytest

from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.fit import make_plan
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.planning.model import find_model
from sgl_jax.planning.target import find_target
from sgl_jax.runtime.compiler import CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.settings.server_args import ServerArgs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.timeout(1200),
]

LAYERS = 2
D = {"Qwen3-8B": 4096, "Qwen3-30B-A3B": 2048}


def collectives(topology: str, tokens: int, args: ServerArgs) -> Counter[tuple[str, tuple[int, ...]]]:
    """Kind and result of each collective that every step of the bucket runs."""
    model = find_model(args)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=LAYERS))
    target = find_target(topology, args.tp_size, args.dp_size)
    plan = make_plan(args, model, target, 1024)
    placement = Placement.over(target.find_devices(), plan.launch.grid)
    kernels = kernels_for(None, target.platform, model.config)
    programs = launch_programs(model.config, plan.launch, target.platform, kernels, placement)
    program = next(each for each in programs if each.name.startswith(f"tokens={tokens} "))
    with jax.default_matmul_precision(matmul_precision(plan.launch.runner_config.compute_dtype)):
        calls = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)
    found = [each for each in hlo.read(calls[program.name].as_text()).collectives() if not each.in_branch]
    return Counter((each.collective or "", array.shape) for each in found for array in each.arrays[-1:])


def test_ranks_meet_in_the_experts_only() -> None:
    """Attention is summed within its rank. Into the experts each rank's tokens go to the others, and back half summed."""
    args = ServerArgs(model_path="Qwen3-30B-A3B", tp_size=4, dp_size=2, ep_size=8)
    of_a_rank, of_all = (32, D[args.model_path]), (64, D[args.model_path])
    assert collectives("v6e-8", 32, args) == {
        ("all-reduce", of_a_rank): 1 + 2 * LAYERS,  # embedding; attention and experts
        ("reduce-scatter", of_a_rank): 1 + LAYERS,
        ("all-gather", of_all): LAYERS + 1,  # into the experts; the last tokens into the logits
    }


def test_sequence_parallelism_replaces_each_sum_by_its_halves() -> None:
    args = ServerArgs(model_path="Qwen3-8B", tp_size=4, enable_sequence_parallel=True)
    part, whole = (128, D[args.model_path]), (512, D[args.model_path])
    assert collectives("v6e-4", 512, args) == {
        ("reduce-scatter", part): 1 + 2 * LAYERS,
        ("all-gather", whole): 2 * LAYERS + 1,
    }


@pytest.mark.parametrize(
    ("topology", "sizes"), [("v6e-16", {"tp_size": 8, "dp_size": 2}), ("v7x-8", {"tp_size": 8, "dp_size": 2})]
)
def test_larger_topologies_can_be_planned(topology: str, sizes: dict[str, int]) -> None:
    args = ServerArgs(model_path="Llama-3.1-70B", **sizes)
    plan = make_plan(args, find_model(args), find_target(topology, args.tp_size, args.dp_size), 1024)
    assert plan.target.num_devices == 16
    assert plan.launch.kv_tokens == 2 * plan.launch.memory.num_tokens
