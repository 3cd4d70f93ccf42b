"""What `python -m sgl_jax.bench_one_batch` does with its flags: every batch once, timed, printed and written down."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.device_batch import BatchTimes, DeviceBatch, Shape, time_batch
from sgl_jax.benchmark.device_batch_report import block, record
from sgl_jax.benchmark.engine_flags import start_log
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost
from sgl_jax.benchmark.serving_report import append_jsonl
from sgl_jax.engine.core import Core
from sgl_jax.engine.loop import one_line
from sgl_jax.engine.messages import LimitsMeasured, MeasureLimits, Refused
from sgl_jax.engine.startup import build_core
from sgl_jax.server_args import ServerArgs
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

COMPILED = 1  # exit code
_PROMPTS = ("The capital of France is", "The capital of the United Kingdom is", "Today is a sunny day and I like")
_WARM_UP_TOKENS = 4
_NO_SCHEDULER = (  # flags that are about one
    "disable_radix_cache",
    "schedule_policy",
    "max_queued_requests",
    "enable_mixed_chunk",
    "disable_overlap_schedule",
    "decode_log_interval",
)


def measure_batches(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Starts the engine's device side and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args, _NO_SCHEDULER)
    return run(args, _started(server_args), lambda: _tokenizer(server_args))


def _started(server_args: ServerArgs) -> Core:
    try:
        return build_core(server_args)
    except (ValueError, OSError) as error:  # those are for the user to mend
        raise BenchmarkError(one_line(error)) from error


def _tokenizer(server_args: ServerArgs) -> Tokenizer:
    try:
        return load_tokenizer(server_args.tokenizer_path or server_args.model_path, None, server_args.download_dir)
    except TokenizerError as error:
        raise BenchmarkError(str(error)) from error


def run(
    args: argparse.Namespace,
    core: Core,
    tokenizer: Callable[[], Tokenizer],
    clock: Callable[[], float] | None = None,
) -> int:
    """Everything after the start. `tokenizer` is called where text is needed. Returns the exit code."""
    if args.correctness_test:
        _generate(args, core, tokenizer())
        return 0
    shapes = [Shape(*each) for each in itertools.product(args.batch_size, args.input_len, args.output_len)]
    for shape in shapes:
        shape.check_fits(core.info)
    prompts = _timed_prompts(args, core.info.vocab_size, tokenizer, np.random.default_rng(args.seed))

    def batch(shape: Shape) -> DeviceBatch:
        return DeviceBatch(core.runner, core.info, prompts(shape.batch_size, shape.input_len), shape.output_len)

    def timed(shape: Shape) -> BatchTimes:
        return time_batch(batch(shape), shape, clock or time.perf_counter)

    limits, cost = _measured_limits(core)
    for shape in shapes:
        timed(replace(shape, output_len=min(shape.output_len, _WARM_UP_TOKENS)))
        times = timed(shape)
        compiles = core.runner.compiles_after_ready
        print(block(times, args.log_decode_step, limits, cost), flush=True)
        if args.result_filename:
            found = record(args.run_name, times, compiles, core.info, limits, cost)
            append_jsonl(Path(args.result_filename), found)
        if args.profile:
            _trace(args.profile_filename_prefix, shape, lambda shape=shape: timed(shape))
    if compiles := core.runner.compiles_after_ready:
        print(f"bench_one_batch: {compiles} programs were compiled while it was timed", file=sys.stderr)
        return COMPILED
    return 0


def _timed_prompts(
    args: argparse.Namespace, vocab_size: int, tokenizer: Callable[[], Tokenizer], rng: np.random.Generator
) -> Callable[[int, int], list[list[int]]]:
    """A function from batch size and length to prompts: drawn ids, or the file's lines, repeated and cut."""
    if args.prompt_filename is None:
        source = IdSource(vocab_size, None, rng)
        return lambda batch_size, length: [source.ids(length) for _ in range(batch_size)]
    found = tokenizer()
    lines = [found.encode(line) for line in _lines(args.prompt_filename)]

    def cut(row: int, length: int) -> list[int]:
        ids = itertools.chain.from_iterable(itertools.islice(itertools.cycle(lines), row % len(lines), None))
        return list(itertools.islice(ids, length))

    return lambda batch_size, length: [cut(row, length) for row in range(batch_size)]


def _lines(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--prompt-filename is {path}; it cannot be read: {error}") from error
    if not lines:
        raise BenchmarkError(f"--prompt-filename is {path}; it has no line with a prompt")
    return lines


def _measured_limits(core: Core) -> tuple[MachineLimits | None, ModelCost]:
    """None, said on standard error, where they cannot be measured."""
    info = core.info
    cost = ModelCost(info.weight_bytes, info.kv_bytes_per_token, info.parameters_per_token)
    core.handle(MeasureLimits(0))
    for event in core.step():
        match event:
            case LimitsMeasured(limits=limits):
                return limits, cost
            case Refused(message=message):
                print(f"bench_one_batch: {message}", file=sys.stderr)
    return None, cost


def _trace(prefix: str, shape: Shape, work: Callable[[], object]) -> None:
    folder = f"{prefix}_batch{shape.batch_size}_input{shape.input_len}_output{shape.output_len}"
    with jax.profiler.trace(folder):
        work()
    print(f"Trace: {folder}\n", flush=True)


def _generate(args: argparse.Namespace, core: Core, tokenizer: Tokenizer) -> None:
    """Prints what the first --output-len tokens after each prompt are."""
    texts = list(_PROMPTS) if args.prompt_filename is None else _lines(args.prompt_filename)
    prompts = [tokenizer.encode(text) for text in texts]
    output_len, at_once = args.output_len[0], core.info.max_running_requests
    number = itertools.count()
    for group in itertools.batched(prompts, at_once):
        Shape(len(group), max(map(len, group)), output_len).check_fits(core.info)
        batch = DeviceBatch(core.runner, core.info, group, output_len)
        if args.cut_len is not None:
            batch.prefill(args.cut_len)
        batch.prefill()
        for _ in range(output_len - 1):
            batch.decode()
        for prompt, output in zip(group, batch.outputs(), strict=True):
            print(f"========== Prompt {next(number)} ==========")
            print(f"input ids: {prompt}")
            print(f"output ids: {output}")
            print(f"{tokenizer.decode([*prompt, *output])}\n", flush=True)
