"""`--compile-only`: fill this machine's compile cache as a launch with the same flags would, without loading weights."""

from __future__ import annotations

import logging
import sys
import time

from sgl_jax.engine.launch_plan import grid_of
from sgl_jax.observability import log
from sgl_jax.planning.model import read_model
from sgl_jax.planning.plan import Misfit, launch_of
from sgl_jax.planning.programs import ProgramFacts, compile_launch
from sgl_jax.planning.target import target_here
from sgl_jax.runtime.compiler import use_compile_cache
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.server_args import ServerArgs

FAILED = 1  # exit code

logger = logging.getLogger(__name__)


def compile_here(args: ServerArgs) -> int:
    """Returns the exit code."""
    started = time.perf_counter()
    try:
        target = target_here(args.device, grid_of(args).num_devices)
        model = read_model(args.model_path, args.downloads, args.model_package)
        launch = launch_of(args, model, target)
        kernels = kernels_for(args.attention_backend, target.platform, model.config)
        use_compile_cache(args.compilation_cache_dir)
        facts = compile_launch(model.config, launch, target, kernels, report_program)
    except (Misfit, ValueError) as error:
        print(f"sgl_jax: error: {error}", file=sys.stderr)
        return FAILED
    hits = sum(each.cache_hit for each in facts)
    logger.info(
        f"{len(facts)} programs in {time.perf_counter() - started:.1f} s, {hits} of them from the cache, "
        f"all now in {args.compilation_cache_dir}"
    )
    return 0


def report_program(done: int, total: int, facts: ProgramFacts) -> None:
    logger.info(log.compile_line(done, total, program=facts.name, seconds=facts.seconds, cache_hit=facts.cache_hit))
