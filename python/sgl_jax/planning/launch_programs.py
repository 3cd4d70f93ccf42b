"""Compiling every program of a launch, and facts about each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.target import Target
from sgl_jax.runtime.compiler import Compiled, CompileWatch, Kept, Program, compile_all, matmul_precision
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.platform import Platform
from sgl_jax.runtime.programs import make_programs


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """Facts about a program on one device. Collectives are those of a step that takes no branch: no penalties, no logprobs."""

    name: str
    seconds: float  # to trace, lower and compile
    cache_hit: bool
    code_bytes: int  # in the device's memory, beside weights and KV
    temp_bytes: int  # used while it runs
    aliased_bytes: int  # arguments that are changed in place
    collectives: int  # in a step
    reduced_bytes: int  # results of all collectives of a step


class DoesNotCompile(ValueError):
    """The compiler refused a program, mostly because it needs too much memory; the message is the compiler's."""


def compile_launch(
    model: DecoderConfig,
    launch: LaunchPlan,
    target: Target,
    kernels: Kernels,
    report: Callable[[int, int, ProgramFacts], None],
    kept: Kept | None = None,
) -> list[ProgramFacts]:
    """Compile a launch's programs in parallel, small ones first, and `report` each with its number and how many there are.

    For devices of this machine it fills the compile cache that the server reads. Raises NoSuchTopology or DoesNotCompile.
    """
    placement = Placement.over(target.find_devices(), launch.grid)
    facts = []

    def done(index: int, total: int, compiled: Compiled) -> None:
        facts.append(read_facts(compiled, model.num_layers))
        report(index, total, facts[-1])

    with jax.default_matmul_precision(matmul_precision(launch.runner_config.compute_dtype)):
        absent = None if target.is_here else placement.mesh
        programs = launch_programs(model, launch, target.platform, kernels, placement)
        try:
            compile_all(programs, CompileWatch(), done, absent=absent, kept=kept)
        except jax.errors.JaxRuntimeError as error:
            raise DoesNotCompile(str(error)) from error
    order = [program.name for program in programs]
    return sorted(facts, key=lambda each: order.index(each.name))


def launch_programs(
    model: DecoderConfig, launch: LaunchPlan, platform: Platform, kernels: Kernels, placement: Placement
) -> list[Program]:
    """Make the programs that a server would compile, from abstract weights."""
    weights = abstract_weights(model, launch.runner_config.weight_dtype, placement, stacked=platform.stacks_layers)
    return make_programs(model, launch.runner_config, kernels, placement, weights, launch.drafter)


def read_facts(compiled: Compiled, num_layers: int) -> ProgramFacts:
    """Read a program's sizes and collectives; those inside a loop count once for each layer."""
    memory: Any = compiled.call.memory_analysis()
    module = hlo.read(compiled.call.as_text() or "")
    always = [each for each in module.collectives() if not each.in_branch]
    times = [num_layers if each.in_loop else 1 for each in always]
    return ProgramFacts(
        name=compiled.program.name,
        seconds=compiled.seconds,
        cache_hit=compiled.cache_hit,
        code_bytes=memory.generated_code_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        collectives=sum(times),
        reduced_bytes=sum(each.nbytes * n for each, n in zip(always, times, strict=True)),
    )
