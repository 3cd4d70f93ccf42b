"""Programs of real launches, compiled for TPUs that are not here, and what is asked of each."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

from sgl_jax.models.weights import site_of
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.fit import Plan, make_plan
from sgl_jax.planning.hlo import Instruction, Module
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.planning.model import PlannedModel, find_model
from sgl_jax.planning.target import find_target
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import CompileWatch, Program, compile_all, matmul_precision
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

# Names of programs, and lines of source in Pallas kernels, in an escaped JSON string.
_NAMES = re.compile(r"module @\w+|\\22debug_locations\\22: \\22[^\\]*\\22")
MOVES = ("copy", "transpose", "dynamic-slice", "slice", "concatenate", "fusion", "custom-call-done", "call-done")

SMALL = 64 << 10  # bytes between devices besides activations: the best token of each row
TEMP_FRACTION = 0.02  # fraction of the pool's bytes
AGREEMENT = 0.02  # between arithmetic and the compiled program


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One step program, compiled: on paper and as XLA made it."""

    plan: Plan
    bucket: Bucket
    args: tuple[Any, ...]  # weights, adapters, pools, state, plan vector
    module: Module
    argument_bytes: int
    temp_bytes: int
    aliased_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.plan.launch.memory.kv_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of the bfloat16 activations between layers."""
        return self.bucket.num_tokens * self.plan.model.config.hidden_size * 2

    @property
    def pool_sizes(self) -> set[int]:
        """Values in each pool of a device."""
        return {math.prod(pool.sharding.shard_shape(pool.shape)) for pool in self.args[2]}

    @property
    def num_layers(self) -> int:
        return self.plan.model.config.num_layers

    def donated_leaves(self) -> int:
        return len(jax.tree.leaves(self.args[2:4]))


@functools.cache
def planned(model: str, topology: str, attention: str | None) -> tuple[Plan, dict[str, Program], Placement]:
    return programs_of(ServerArgs(model_path=model, attention_backend=attention), topology)


def programs_of(args: ServerArgs, topology: str) -> tuple[Plan, dict[str, Program], Placement]:
    """Plan a launch over all chips of the topology, and make its programs."""
    return programs_for(args, find_model(args), topology)


def programs_for(args: ServerArgs, model: PlannedModel, topology: str) -> tuple[Plan, dict[str, Program], Placement]:
    """Make the programs of a launch of this model, whatever the flags name."""
    target = find_target(topology)
    plan = make_plan(args, model, target, 1024)
    placement = Placement.over(target.find_devices(), plan.launch.grid)
    programs = launch_programs(
        plan.model.config,
        plan.launch,
        target.platform,
        kernels_for(args.attention_backend, target.platform, plan.model.config),
        placement,
    )
    return plan, {program.name: program for program in programs}, placement


def digest(programs: Iterable[Program], placement: Placement) -> str:
    """Digest of programs as they are handed to the compiler, without their names and the lines of source they come from."""
    found = hashlib.sha256()
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        for program in programs:
            text = program.function.trace(*program.args).lower(lowering_platforms=("tpu",)).as_text()
            found.update(f"{program.name}\0{_NAMES.sub('', text)}\0".encode())
    return found.hexdigest()[:12]


@functools.cache
def step_program(model: str, topology: str, attention: str | None, tokens: int) -> StepProgram:
    """The default launch's program of that many tokens. Compiled once in a test run."""
    plan, programs, placement = planned(model, topology, attention)
    bucket = next(step.bucket for step in plan.steps if step.bucket.num_tokens == tokens)
    return compiled(plan, bucket, programs[step_name(bucket)], placement)


def compiled(plan: Plan, bucket: Bucket, program: Program, placement: Placement) -> StepProgram:
    with jax.default_matmul_precision(matmul_precision(plan.launch.runner_config.compute_dtype)):
        calls = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)
    return read(plan, bucket, program, calls[program.name])


def read(plan: Plan, bucket: Bucket, program: Program, call: Any) -> StepProgram:
    memory = call.memory_analysis()
    module = hlo.read(call.as_text())
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes
    return StepProgram(plan, bucket, program.args, module, *sizes)


def planned_bytes(step: StepProgram) -> tuple[int, int]:
    """By arithmetic alone, of one device: what a step is given, and what it sums over the devices, drafting not counted."""
    launch, runner = step.plan.launch, step.plan.launch.runner_config
    state = runner.state_sizes(step.plan.model.config.shard(launch.grid)).nbytes
    (reduced,) = [int(each.cost.reduced_bytes) for each in step.plan.steps if each.bucket == step.bucket]
    return launch.weight_bytes + launch.memory.kv_bytes + state, reduced


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def pool_copies(step: StepProgram) -> list[Instruction]:
    """Instructions that make another array of a pool's size; a scatter into the pool is no copy."""
    return [
        each
        for each in step.module.instructions()
        if each.opcode in ("copy", "copy-start", "transpose") and any(a.size in step.pool_sizes for a in each.arrays)
    ]


def weight_moves(step: StepProgram) -> list[Instruction]:
    """Instructions that make another of a layer's matrices: what is multiplied should be read where it lies. A prefetch
    (copy-start, slice-start, and what puts its parts together) into the chip's own memory is none."""
    weights: dict[
        str, tuple[int, ...]
    ] = {}  # by instruction that is a matrix of a layer, or a prefetched one: its sides
    found = []
    for each in step.module.computations[step.module.entry]:
        if each.opcode == "parameter" and ".layers[" in each.op_name:
            (array,) = each.arrays
            if len(sides(array.shape)) > 1:
                weights[each.name] = sides(array.shape)
        for weight in {weights[name] for name in each.operands if name in weights}:
            same = any(sides(array.shape) == weight for array in each.arrays)
            if each.opcode in MOVES and same and not step.module.multiplies(each):
                found.append(each)
            elif is_product_kernel(each) or each.opcode == "fusion":
                continue
            elif same or each.opcode.endswith(("-start", "-done", "get-tuple-element")):
                weights[each.name] = weight
    assert weights, "no parameter of the program is a matrix of a layer"
    return found


def is_product_kernel(each: Instruction) -> bool:
    """Whether it is a kernel that multiplies tokens with a dense matrix."""
    return each.opcode == "custom-call" and each.name.startswith(("dense_product", "dense_gated"))


def products(step: StepProgram) -> Counter[str]:
    """How many products with weights there are: dense ones by the scope they come from, and of experts."""
    found: Counter[str] = Counter()
    for each in step.module.instructions():
        if each.opcode == "custom-call" and each.name.startswith("experts_"):
            found["experts"] += 1
        if is_product_kernel(each):
            found[each.op_name.split("/")[-3]] += 1
        for inner in step.module.fused(each) if not each.in_branch else ():
            if step.module.multiplies(inner) and "oi,ti->ot" in inner.op_name:
                found[inner.op_name.rpartition("/oi,ti->ot")[0].rpartition("/")[2]] += 1
    return found


# The scope of a site's products: by its name, or by the part of the layer it is in.
_SCOPES = {"gate_up": "mlp", "down": "mlp", "": "attention", "mla": "attention", "moe": "mlp", "moe.experts": "experts"}


def expected_products(step: StepProgram) -> Counter[str]:
    """One product for each declared matrix that has a site and each part, and one with the output head, which may be the
    embedding."""
    leaves = jax.tree_util.tree_flatten_with_path(step.args[0])[0]
    sites = [site for path, _ in leaves if (site := site_of(path)) not in (None, "lm_head")]
    scopes = [_SCOPES.get(site, _SCOPES[site.rpartition(".")[0]]) for site in sites]
    return Counter(logits=1) + Counter(scopes * step.bucket.num_parts)


def sums(step: StepProgram) -> tuple[int, list[int]]:
    """Count the sums of activations over the devices in a step that takes no branch; list the bytes of every other
    collective. A sum of a step in parts is a reduce-scatter and an all-gather of each."""
    always = [each for each in step.module.collectives() if not each.in_branch]
    parts, devices = step.bucket.num_parts, step.plan.target.num_devices
    gathered = step.activation_bytes // parts
    sizes = {"all-reduce": gathered} if parts == 1 else {"all-gather": gathered, "reduce-scatter": gathered // devices}
    found = Counter(each.collective for each in always if each.nbytes == sizes.get(each.collective or ""))
    others = [each.nbytes for each in always if each.nbytes != sizes.get(each.collective or "")]
    return min(found[kind] for kind in sizes) // parts, others


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
    if step.temp_bytes >= TEMP_FRACTION * step.pool_bytes:
        found.append(f"{step.temp_bytes / 1e6:.0f} MB of temporaries, the pool has {step.pool_bytes / 1e6:.0f} MB")
    if moves := weight_moves(step):
        found.append(f"matrices of a layer are copied by {', '.join(each.name for each in moves)}")
    if products(step) != expected_products(step):
        found.append(f"products with weights are {dict(products(step))}, not {dict(expected_products(step))}")
    activations, others = sums(step)
    if activations != (2 * step.num_layers + 1 if devices > 1 else 0) or sum(others) > SMALL:
        found.append(f"{activations} sums of activations over the devices, and others of {others} bytes")
    if largest_gathered_axis(step) >= step.plan.model.config.vocab_size // devices // 16:
        found.append(f"something {largest_gathered_axis(step)} long is gathered")
    given, reduced = planned_bytes(step)
    if abs(step.argument_bytes - given) > AGREEMENT * given:
        found.append(f"it is given {step.argument_bytes} bytes, and {given} were planned")
    if abs(activations * step.activation_bytes - reduced) > AGREEMENT * reduced:
        found.append(f"{activations * step.activation_bytes} bytes are summed over the devices, {reduced} were planned")
    return found
