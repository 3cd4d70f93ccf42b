"""The KV cache's dtype, and the scales of each layer where its numbers have eight bits.

A float8 pool takes the scales of the checkpoint, or 1. An int8 pool takes those of the largest K and V that each layer makes
of random tokens.
"""

import dataclasses
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.weights import LayerWeights, Weights
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.request import Request, SamplingParams
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import Kept
from sgl_jax.runtime.pool import pools_of
from sgl_jax.runtime.programs import RunnerConfig
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.settings.server_args import ServerArgs

logger = logging.getLogger(__name__)

_DTYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "bf16": "bfloat16"}
_TOKENS = 256  # whose K and V are looked at
_MARGIN = 1.25  # by which K and V of other tokens may be larger before they are cut
_LARGEST = 127.0


def with_kv_dtype(args: ServerArgs, model: DecoderConfig) -> DecoderConfig:
    """Return the model with the dtype of --kv-cache-dtype, its draft model likewise."""
    dtype = None if args.kv_cache_dtype == "auto" else _DTYPES.get(args.kv_cache_dtype, args.kv_cache_dtype)
    draft = model.draft
    if draft is not None:
        draft = dataclasses.replace(draft, decoder=dataclasses.replace(draft.decoder, kv_dtype=dtype))
    return dataclasses.replace(model, kv_dtype=dtype, draft=draft)


def with_kv_scales(
    weights: Weights[jax.Array],
    model: DecoderConfig,
    plan: LaunchPlan,
    kernels: Kernels,
    placement: Placement,
    kept: Kept | None,
    *,
    stacks_layers: bool,
    barrier: Callable[[], object],
) -> Weights[jax.Array]:
    """Return the weights with measured scales where the KV cache is int8, else unchanged. The log says where scales are from.
    `barrier`: see ModelRunner.start."""
    if not model.scales_kv:
        return weights
    if model.kv_dtype != "int8":
        source = "the checkpoint's scales, or 1 where it has none"
    else:
        source = f"scales measured on {_TOKENS} random tokens"
        kernels = dataclasses.replace(kernels, attention=dataclasses.replace(kernels.attention, make_pool=jnp.zeros))
        plain = dataclasses.replace(model, kv_dtype=None, draft=None)
        config = _small_config(plain, plan, kernels)
        runner = ModelRunner(plain, config, kernels, placement, stacks_layers=stacks_layers, kept=kept)
        runner.compile(lambda *_: None).result()
        runner.start(_replaced(dataclasses.replace(weights, draft=None), None), barrier)
        largest = _largest(runner, plain, placement)
        weights = _replaced(weights, np.maximum(largest, 1e-6) * np.float32(_MARGIN / _LARGEST))
    logger.info("The KV cache is held as %s, with %s.", model.kv_dtype, source)
    return weights


def _small_config(model: DecoderConfig, plan: LaunchPlan, kernels: Kernels) -> RunnerConfig:
    """Return the launch's config with one step, that of a prompt on each rank, and a pool for it of the compute dtype."""
    config, length = plan.runner_config, min(_TOKENS, model.context_length - 1)
    return dataclasses.replace(
        config,
        pools=pools_of(model.shard(plan.grid), kernels.attention, config.compute_dtype),
        num_pages=-(-length // config.page_size) + 2,
        num_rows=config.num_ranks,
        context_length=length + 1,
        buckets=(Bucket(length + -length % plan.grid.tensor, 1),),
        width=1,
        lookahead=0,
        keeps_tokens=False,
    )


def _largest(runner: ModelRunner, model: DecoderConfig, placement: Placement) -> np.ndarray:
    """Return f32[L, 2]: the largest K and V that each layer makes of random tokens."""
    config = runner.config
    length = config.context_length - 1
    caches = [PrefixCache(config.num_pages, config.page_size) for _ in range(config.num_ranks)]
    scheduler = Scheduler(SchedulerConfig(1, config.context_length, length, length), caches)
    prompt = np.random.default_rng(0).integers(model.vocab_size, size=length, dtype=np.int32)
    nothing = np.zeros(0, np.int32)
    for rank in range(config.num_ranks):  # the same for each, so that any grid has the scales of one device
        scheduler.add(Request(rank, prompt, SamplingParams(), "", 0, config.context_length, nothing, rank))
    step = scheduler.schedule()
    assert step is not None
    runner.launch(step).collect()
    (pool,) = runner.pools

    def largest_of(pool: jax.Array) -> jax.Array:
        by_page = pool.reshape(config.num_ranks, model.num_layers, config.num_pages, *pool.shape[1:])
        written = by_page[:, :, 1:]  # without the scratch pages
        return jnp.abs(written.astype(jnp.float32)).max(axis=(0, 2, 3, 5, 6))

    largest = np.asarray(jax.jit(largest_of, out_shardings=placement.sharding())(pool))  # [L, planes], on every host
    return np.broadcast_to(largest, (model.num_layers, 2))


def _replaced(weights: Weights[jax.Array], scales: np.ndarray | None) -> Weights[jax.Array]:
    """Return the weights with the scales f32[L, 2] in their layers, or without any. Draft layers take the largest of all."""
    first = 0

    def layer(w: LayerWeights[jax.Array], of: np.ndarray | None) -> LayerWeights[jax.Array]:
        old = w.kv_scales
        return dataclasses.replace(w, kv_scales=None if of is None or old is None else jax.device_put(of, old.sharding))

    layers = []
    for w in weights.layers:
        number = len(w.mlp_norm) if weights.stacked else 1
        mine = None if scales is None else scales[first : first + number] if weights.stacked else scales[first]
        layers.append(layer(w, mine))
        first += number
    draft = weights.draft
    if draft is not None and scales is not None:
        draft = dataclasses.replace(draft, layers=[layer(w, scales.max(0)) for w in draft.layers])
    return dataclasses.replace(weights, layers=type(weights.layers)(layers), draft=draft)
