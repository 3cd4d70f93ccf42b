"""Real runner of the small checkpoint, for tests of device code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from fakes.fake_core import fake_info
from quick_compiles import quick_compiles
from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.platform import PLATFORMS, kernels_for
from sgl_jax.runtime.pool import pools_of
from sgl_jax.runtime.programs import RunnerConfig
from sgl_jax.runtime.runner import Announce, ModelRunner, announce_to_nobody
from sgl_jax.runtime.step_spec import Drafter
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from simulated import ByRows

ROWS, CONTEXT, PAGE_SIZE, PAGES = 4, 96, 4, 120


def small_runner(
    folder: Path,
    *,
    widths: tuple[int, ...] = (1,),
    drafter: Drafter | None = None,
    keeps_tokens: bool = False,
    simulated_acceptance: float | None = None,
    announce: Announce = announce_to_nobody,
) -> ModelRunner:
    """Make a float32 runner on one CPU device, compiled and started, with a bucket of each width."""
    checkpoint = open_checkpoint(str(folder), load_format="auto")
    model = decoder_config(checkpoint.config, checkpoint.generation_config, checkpoint.tensors)
    placement = Placement.over(jax.devices("cpu")[:1])
    kernels = kernels_for(None, PLATFORMS["cpu"], model)
    pools = pools_of(model, kernels.attention, "float32")
    buckets = tuple(Bucket(32, ROWS, width) for width in widths)
    options = {"keeps_tokens": keeps_tokens, "width": max(widths), "simulated_acceptance": simulated_acceptance}
    config = RunnerConfig("float32", "float32", pools, PAGE_SIZE, PAGES + 1, ROWS, CONTEXT, buckets, **options)
    runner = ModelRunner(model, config, kernels, placement, stacks_layers=False, announce=announce, drafter=drafter)
    with quick_compiles():
        runner.compile(lambda *_: None).result()
    runner.start(load_weights(checkpoint, model, "float32"))
    return runner


def small_core(
    runner: ModelRunner,
    *,
    overlap: bool = True,
    width: Callable[[int], int] | None = None,
    num_pages: int = PAGES,
) -> Core:
    """Make an engine core over the runner, with an empty cache of num_pages pages. `width`: decoding rows -> W; by default the
    runner's greatest."""
    config = runner.config
    widths = ByRows(width or (lambda num_decoding: config.width), ROWS)
    scheduler = Scheduler(
        SchedulerConfig(ROWS, CONTEXT, 32, 32, width=widths.width, wide_rows=ROWS, keeps_tokens=config.keeps_tokens),
        [PrefixCache(num_pages + 1, PAGE_SIZE)],
        widths,
    )
    info = fake_info(vocab_size=512, context_length=CONTEXT, eos_token_id=2)
    return Core(scheduler, runner, info, overlap=overlap, random_seed=0)
