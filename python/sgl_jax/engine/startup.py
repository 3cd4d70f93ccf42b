"""From server arguments to a core that is ready to step, telling the user what happens on the way."""

from __future__ import annotations

import logging
import math
import time

import jax
import numpy as np

from sgl_jax import __version__
from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.models.checkpoint import Checkpoint, open_checkpoint
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights, random_weights
from sgl_jax.models.weights import Weights, declare, parameters_per_token
from sgl_jax.observability import log
from sgl_jax.observability.progress import weight_progress
from sgl_jax.runtime.buckets import make_buckets
from sgl_jax.runtime.compiler import Compiled
from sgl_jax.runtime.memory import device_memory, plan_memory
from sgl_jax.runtime.platform import Platform, attention_for, pick_devices, stack_layers
from sgl_jax.runtime.runner import ModelRunner, RunnerConfig
from sgl_jax.runtime.state import MAX_EOS_TOKENS, state_bytes
from sgl_jax.scheduler.scheduler import Scheduler, SchedulerConfig
from sgl_jax.server_args import ServerArgs

logger = logging.getLogger(__name__)


def build_core(args: ServerArgs) -> Core:
    """Load the model, size memory, compile every program. Raises ValueError with a line for the user."""
    started = time.perf_counter()
    jax.config.update("jax_compilation_cache_dir", args.compilation_cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    platform, devices = pick_devices(args.device)
    device = devices[0]
    logger.info(log.banner(__version__, args.model_path, [device.device_kind]))
    logger.info(log.changed_args_line(args.changed()))

    checkpoint = open_checkpoint(args.model_path, load_format=args.load_format, download_dir=args.download_dir)
    model = decoder_config(checkpoint.config, checkpoint.generation_config)
    if len(model.eos_token_ids) > MAX_EOS_TOKENS:
        raise ValueError(
            f"the model has {len(model.eos_token_ids)} end-of-sequence tokens; at most {MAX_EOS_TOKENS} fit"
        )
    dtype = _dtype(args, checkpoint, platform)
    page_size = args.page_size or platform.page_size
    context_length = min(args.context_length or model.context_length, model.context_length)
    if args.context_length is not None and args.context_length > model.context_length:
        raise ValueError(
            f"--context-length is {args.context_length}; the model was made for {model.context_length} tokens at most"
        )
    itemsize = np.dtype(dtype).itemsize
    weight_bytes = sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare(model))) * itemsize
    max_running = args.max_running_requests or platform.max_running_requests
    memory = plan_memory(  # before the weights are read: what does not fit should be said at once
        model,
        platform,
        total_bytes=device_memory(device),
        weight_bytes=weight_bytes,
        state_bytes=state_bytes(max_running, -(-context_length // page_size), model.vocab_size),
        dtype_bytes=itemsize,
        page_size=page_size,
        context_length=context_length,
        mem_fraction=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
    )
    for flag, value, most in (
        ("--context-length", args.context_length, memory.num_tokens),
        ("--max-running-requests", args.max_running_requests, memory.num_pages - 1),
    ):
        if value is not None and value > most:
            raise ValueError(
                f"{flag} is {value}; the KV pool of {memory.num_tokens} tokens in pages of {page_size} allows {most}; "
                f"lower it, or raise --max-total-tokens or --mem-fraction-static"
            )
    context_length = min(context_length, memory.num_tokens)
    max_running = min(max_running, memory.num_pages - 1)
    prefill_tokens = _prefill_tokens(args, platform, context_length)
    step_tokens = max(prefill_tokens, max_running)  # every running request has room for one token
    logger.info(
        log.memory_table(
            weights=weight_bytes,
            kv=memory.kv_bytes,
            free=memory.total_bytes - weight_bytes - memory.kv_bytes,
            kv_tokens=memory.num_tokens,
            context_length=context_length,
        )
    )

    weights = _load(checkpoint, model, dtype, args, platform)
    config = RunnerConfig(
        dtype=dtype,
        page_size=page_size,
        num_pages=memory.num_pages,
        num_rows=max_running,
        context_length=context_length,
        buckets=make_buckets(step_tokens, max_running, platform.smallest_bucket[dtype]),
    )
    runner = ModelRunner(weights, model, config, attention_for(args.attention_backend, platform), device)
    runner.warm_up(_report_compile)
    cache = PrefixCache(memory.num_pages, page_size, enabled=not args.disable_radix_cache)
    scheduler = Scheduler(
        SchedulerConfig(
            max_running_requests=max_running,
            context_length=context_length,
            max_step_tokens=step_tokens,
            max_prefill_tokens=prefill_tokens,
            policy=args.schedule_policy,
        ),
        cache,
    )
    info = EngineInfo(
        model_path=args.model_path,
        architecture=model.architecture,
        dtype=dtype,
        platform=platform.name,
        device_kind=device.device_kind,
        num_devices=1,
        vocab_size=model.vocab_size,
        context_length=context_length,
        eos_token_ids=list(model.eos_token_ids),
        page_size=page_size,
        max_total_tokens=memory.num_tokens,
        max_running_requests=max_running,
        chunked_prefill_size=prefill_tokens,
        num_programs=runner.num_programs,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=memory.bytes_per_token,
        parameters_per_token=parameters_per_token(model),
        start_seconds=time.perf_counter() - started,
    )
    return Core(
        scheduler,
        runner,
        info,
        overlap=not args.disable_overlap_schedule,
        random_seed=args.random_seed,
        decode_log_interval=args.decode_log_interval,
    )


def _dtype(args: ServerArgs, checkpoint: Checkpoint, platform: Platform) -> str:
    """The dtype asked for; on auto the one the weights were saved in, where the platform computes in it."""
    if args.dtype != "auto":
        return args.dtype
    return "float32" if checkpoint.dtype == "float32" else platform.dtype


def _prefill_tokens(args: ServerArgs, platform: Platform, context_length: int) -> int:
    """The prompt tokens a step computes at most, whether of one prompt or several."""
    chunk = args.chunked_prefill_size or platform.chunked_prefill_size
    if chunk == -1:
        chunk = args.max_prefill_tokens
    return min(chunk, args.max_prefill_tokens, context_length)


def _load(checkpoint: Checkpoint, model: DecoderConfig, dtype: str, args: ServerArgs, platform: Platform) -> Weights:
    with weight_progress(logger, checkpoint.total_bytes) as report:
        if checkpoint.format == "dummy":
            weights = random_weights(model, dtype, args.random_seed or 0, report=report)
        else:
            # A quantised GGUF means the same weights whatever the dtype: those of the model it was made from.
            rounded_to = checkpoint.dtype if checkpoint.format == "gguf" else None
            weights = load_weights(checkpoint, model, dtype, rounded_to=rounded_to, report=report)
    return stack_layers(weights) if platform.stacks_layers else weights


def _report_compile(done: int, total: int, compiled: Compiled) -> None:
    logger.info(
        log.compile_line(
            done, total, program=compiled.program.name, seconds=compiled.seconds, cache_hit=compiled.cache_hit
        )
    )
