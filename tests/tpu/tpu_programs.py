"""Programs of real launches, compiled for TPUs that are not here, and what is asked of each."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.model import find_model
from sgl_jax.planning.plan import Plan, make_plan
from sgl_jax.planning.programs import launch_programs
from sgl_jax.planning.target import find_target
from sgl_jax.runtime import hlo
from sgl_jax.runtime.compiler import CompileWatch, Program, compile_all, matmul_precision
from sgl_jax.runtime.hlo import Instruction, Module
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.server_args import ServerArgs

# A custom call may be no more than the parts of a prefetched matrix seen as one; one that moves ends in a -done.
MOVES = ("copy", "transpose", "dynamic-slice", "slice", "concatenate", "fusion", "custom-call-done", "call-done")

SMALL = 64 << 10  # bytes between devices besides activations: the best token of each row
TEMP_SHARE = 0.02  # of the pool


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One step program, compiled: on paper and as XLA made it."""

    plan: Plan
    tokens: int
    rows: int
    args: tuple[Any, ...]  # weights, pool, state, plan vector
    module: Module
    temp_bytes: int
    aliased_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.plan.launch.memory.kv_bytes

    @property
    def layer_weights(self) -> set[tuple[int, ...]]:
        """The shape of each matrix of a layer, on one device, its sides in order of length."""
        weights = jax.tree.leaves(self.args[0].layers)
        shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in weights]
        per_layer = int(self.args[0].stacked)
        return {sides(shape[per_layer:]) for shape in shards if len(shape) == 2 + per_layer}

    @property
    def num_layers(self) -> int:
        return self.plan.model.config.num_layers

    def donated_leaves(self) -> int:
        return len(jax.tree.leaves(self.args[1:3]))


@functools.cache
def planned(model: str, topology: str, attention: str | None) -> tuple[Plan, dict[str, Program], Placement]:
    args = ServerArgs(model_path=model, attention_backend=attention)
    target = find_target(topology, 1)
    plan = make_plan(args, find_model(model), target, 1024)
    placement = Placement.over(target.find_devices())
    programs = launch_programs(
        plan.model.config,
        plan.launch,
        target.platform,
        kernels_for(attention, target.platform, plan.model.config),
        placement,
    )
    return plan, {program.name: program for program in programs}, placement


@functools.cache
def step_program(model: str, topology: str, attention: str | None, tokens: int) -> StepProgram:
    """The default launch's program of that many tokens. Compiled once in a test run."""
    plan, programs, placement = planned(model, topology, attention)
    step = next(step for step in plan.steps if step.bucket.num_tokens == tokens)
    program = programs[f"tokens={tokens} rows={step.bucket.num_rows}"]
    with jax.default_matmul_precision(matmul_precision(plan.launch.dtype)):
        calls = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)
    return read(plan, tokens, step.bucket.num_rows, program, calls[program.name])


def read(plan: Plan, tokens: int, rows: int, program: Program, call: Any) -> StepProgram:
    memory = call.memory_analysis()
    module = hlo.read(call.as_text())
    return StepProgram(plan, tokens, rows, program.args, module, memory.temp_size_in_bytes, memory.alias_size_in_bytes)


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def pool_copies(step: StepProgram) -> list[Instruction]:
    """Instructions that make another array of the pool's size; a scatter into the pool is no copy."""
    size = math.prod(step.args[1].sharding.shard_shape(step.args[1].shape))
    return [
        each
        for each in step.module.instructions()
        if each.opcode in ("copy", "copy-start", "transpose") and any(array.size == size for array in each.arrays)
    ]


def layers(step: StepProgram) -> Iterator[tuple[Instruction, int]]:
    """What runs for the layers, and how often: once each where layers are a list, else as often as the loop turns."""
    stacked = step.args[0].stacked
    if not stacked:
        yield from ((each, 1) for each in step.module.instructions() if not each.in_branch)
    else:
        yield from ((each, step.num_layers) for each in step.module.layer_instructions())


def weight_moves(step: StepProgram) -> list[Instruction]:
    """Instructions whose result has the shape of one of a layer's matrices: what is multiplied should be read where it
    lies. A prefetch (copy-start, slice-start) into the chip's own memory is none."""
    return [
        each
        for each, _ in layers(step)
        if each.opcode in MOVES and any(sides(array.shape) in step.layer_weights for array in each.arrays)
    ]


def layer_products(step: StepProgram) -> Counter[str]:
    """How many products with weights there are, by the scope they come from, over all layers."""
    found: Counter[str] = Counter()
    for each, times in layers(step):
        for inner in step.module.fused(each):
            if inner.opcode in ("convolution", "dot") and "oi,ti->ot" in inner.op_name:
                found[inner.op_name.rpartition("/oi,ti->ot")[0].rpartition("/")[2]] += times
    return found


def sums(step: StepProgram) -> tuple[int, list[int]]:
    """Of a step that takes no branch: how often activations are summed over the devices, and the bytes of everything
    else that goes between them."""
    activations = step.tokens * step.plan.model.config.hidden_size * 2
    always = [each for each in step.module.collectives() if not each.in_branch]
    times = [step.num_layers if each.in_loop else 1 for each in always if each.nbytes == activations]
    return sum(times), [each.nbytes for each in always if each.nbytes != activations]


def largest_gathered_axis(step: StepProgram) -> int:
    """The longest axis of anything that devices gather or sum over all rows, in any branch, but for activations."""
    width = step.plan.model.config.hidden_size
    shapes = [array.shape for each in step.module.collectives() for array in each.arrays]
    return max((n for shape in shapes if not (shape and shape[-1] == width) for n in shape), default=0)


def faults(step: StepProgram) -> list[str]:
    """All that is asked of a step program, as sentences about what is not so."""
    devices = step.plan.target.num_devices
    found = []
    if [output for output, _ in step.module.aliased] != list(range(step.donated_leaves())):
        found.append("pool or state is not changed in place")
    if copies := pool_copies(step):
        found.append(f"the pool is copied by {', '.join(each.name for each in copies)}")
    if step.temp_bytes >= TEMP_SHARE * step.pool_bytes:
        found.append(f"{step.temp_bytes / 1e6:.0f} MB of temporaries, the pool has {step.pool_bytes / 1e6:.0f} MB")
    if moves := weight_moves(step):
        found.append(f"matrices of a layer are copied by {', '.join(each.name for each in moves)}")
    if (products := layer_products(step)) != Counter(attention=2 * step.num_layers, mlp=2 * step.num_layers):
        found.append(f"{step.num_layers} layers have as products with weights {dict(products)}")
    activations, others = sums(step)
    if activations != (2 * step.num_layers + 1 if devices > 1 else 0) or sum(others) > SMALL:
        found.append(f"{activations} sums of activations over the devices, and others of {others} bytes")
    if largest_gathered_axis(step) >= step.plan.model.config.vocab_size // devices // 16:
        found.append(f"something {largest_gathered_axis(step)} long is gathered")
    return found
