"""What `python -m sgl_jax.bench_offline_throughput` does with its flags, from the data set to the exit code."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from sgl_jax.benchmark.datasets import load_prompts
from sgl_jax.benchmark.engine_flags import engine_options, start_log
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.figures import roofline_json
from sgl_jax.benchmark.offline import Offline, block, record
from sgl_jax.benchmark.records import Prompt
from sgl_jax.benchmark.roofline import ModelCost
from sgl_jax.benchmark.serving_report import append_jsonl, roofline_block
from sgl_jax.engine.engine import Engine
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.server_args import ServerArgs
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

SOME_FAILED = 1  # exit code
_TRACED_PROMPTS = 16  # at most


def measure_offline(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Reads the data, starts an engine and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args)
    try:
        path = server_args.tokenizer_path or server_args.model_path
        tokenizer = load_tokenizer(path, server_args.chat_template, server_args.download_dir)
        prompts = load_prompts(args, tokenizer, None, args.seed)  # before the model: a mistake should be said at once
        with Engine(**engine_options(server_args)) as engine:
            return run(args, engine, prompts)
    except (TokenizerError, EngineFailed) as error:
        raise BenchmarkError(str(error)) from error


def run(
    args: argparse.Namespace,
    engine: Engine,
    prompts: Sequence[Prompt],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Everything after the start. Returns the exit code."""
    sampling = {"temperature": 0.0, "ignore_eos": not args.disable_ignore_eos, **args.extra_request_body}
    offline = Offline(engine, prompts, sampling)
    if not args.skip_warmup:
        offline.warm_up()
    limits = offline.limits()
    found = offline.run(clock)
    info = engine.info
    roofline = None
    if limits is not None and found.output_tokens:
        cost = ModelCost(info.weight_bytes, info.kv_bytes_per_token, info.parameters_per_token)
        roofline = found.roofline(cost, limits)
    print(f"\n{block(found, args.backend)}")
    if roofline is not None:
        print(f"\n{roofline_block(roofline)}")
    if args.result_filename:
        settings = {
            "backend": args.backend,
            "model_path": info.model_path,
            "dtype": info.dtype,
            "dataset_name": args.dataset_name,
            "num_prompts": len(prompts),
            "seed": args.seed,
            "sampling_params": sampling,
        }
        shares = {} if roofline is None else roofline_json(roofline)
        append_jsonl(Path(args.result_filename), settings | record(found) | shares)
    if args.profile:
        engine.flush_cache()
        with jax.profiler.trace(args.profile_output_dir):
            offline.generate(_TRACED_PROMPTS)
        print(f"\nTrace: {args.profile_output_dir}")
    return SOME_FAILED if found.successful < len(prompts) else 0
