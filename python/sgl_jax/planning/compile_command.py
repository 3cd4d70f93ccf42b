"""Work of `python -m sgl_jax.compile` and `--compile-only`: plan a launch, compile its programs."""

import json
import logging
import sys
import time
from pathlib import Path

import jax
import rich.console

from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.engine.startup import kept_programs
from sgl_jax.observability import log
from sgl_jax.planning import plan_report
from sgl_jax.planning.fit import Misfit, launch_of, make_plan
from sgl_jax.planning.launch_programs import DoesNotCompile, ProgramFacts, compile_launch
from sgl_jax.planning.model import PlannedModel, bundled_path, find_model, read_model
from sgl_jax.planning.target import Target, find_target, target_here
from sgl_jax.planning.topology import set_tpu_environment
from sgl_jax.runtime.compiler import cache_takes_programs, use_compile_cache
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.settings.speculators import with_verifier

FAILED, BAD_USE = 1, 2  # exit codes

logger = logging.getLogger(__name__)


def compile_here(args: ServerArgs) -> int:
    """Fill this machine's compile cache as a launch would, without weights (`--compile-only`). Returns the exit code."""
    started = time.perf_counter()
    try:
        target = target_here(args.device, args.num_devices)
        model = read_model(args)
        facts = _compile(args, model, target, launch_of(args, model, target))
    except ValueError as error:
        return _failed(f"sgl_jax: error: {error}")
    if not cache_takes_programs(args.compilation_cache_dir):
        return FAILED
    hits = sum(each.cache_hit for each in facts)
    logger.info(
        f"{len(facts)} programs in {time.perf_counter() - started:.1f} s, {hits} of them from the cache, "
        f"all now in {args.compilation_cache_dir}"
    )
    return 0


def compile_for(args: ServerArgs, topology: str, context: int, *, only_plan: bool, json_file: str | None) -> int:
    """Run `sgl_jax.compile` with its flags; `json_file` "-" is standard output. Returns the exit code."""
    try:
        return _compile_for(args, topology, context, only_plan, json_file)
    except Misfit as error:
        return _failed(f"compile: it does not fit: {error}")
    except DoesNotCompile as error:
        return _failed(f"compile: it does not compile: {error}")
    except ValueError as error:  # a flag, a model or a topology that is wrong, or something that a backend cannot do
        return _failed(f"compile: error: {error}", BAD_USE)


def _compile_for(args: ServerArgs, topology: str, context: int, only_plan: bool, json_file: str | None) -> int:
    if topology not in ("cpu", "gpu"):  # no device of this machine is used, or taken from a program that runs on it
        set_tpu_environment()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # no launch on this machine could use its entries
    target = find_target(topology, args.tp_size, args.dp_size)
    if args.device not in (None, target.platform.name):
        raise ValueError(f"--device is {args.device}; --topology {topology} is {target.platform.name}: leave it out")
    if bundled_path(args.model_path) is None:
        args = with_verifier(args)
    model = find_model(args)
    plan = make_plan(args, model, target, context)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120, quiet=json_file == "-")
    facts, seconds, surplus = None, None, None
    if not only_plan:
        target.find_devices()  # a topology that cannot be compiled for is refused before the tables
    console.print(plan_report.fit_table(plan), plan_report.step_table(plan))
    if not only_plan:
        started = time.perf_counter()
        facts = _compile(args, model, target, plan.launch)
        seconds = time.perf_counter() - started
        console.print(plan_report.program_table(facts))
        console.print(f"Compiled {len(facts)} programs in {seconds:.0f} s.")
        surplus = plan_report.overflow(plan, facts)
    if json_file:
        text = json.dumps(plan_report.as_data(plan, facts, seconds), indent=2) + "\n"
        sys.stdout.write(text) if json_file == "-" else Path(json_file).write_text(text, encoding="utf-8")
    return _failed(f"compile: it does not fit: {surplus}") if surplus else 0


def _compile(args: ServerArgs, model: PlannedModel, target: Target, launch: LaunchPlan) -> list[ProgramFacts]:
    """Compile with a line in the log for each program, and through the cache if the devices are here."""

    def report(done: int, total: int, facts: ProgramFacts) -> None:
        seconds = time.perf_counter() - started
        logger.info(log.compile_line(done, total, program=facts.name, seconds=seconds, cache_hit=facts.cache_hit))

    started = time.perf_counter()
    kernels = kernels_for(args.attention_backend, target.platform, model.config)
    if target.is_here:
        use_compile_cache(args.compilation_cache_dir)
    kept = kept_programs(args, target.find_devices()) if target.is_here else None
    return compile_launch(model.config, launch, target, kernels, report, kept)


def _failed(message: str, code: int = FAILED) -> int:
    print(message, file=sys.stderr)
    return code
