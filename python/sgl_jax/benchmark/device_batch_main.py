"""What `python -m sgl_jax.bench_one_batch` does with its flags: every batch once, timed, printed and written down."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.device_batch import BatchTimes, DeviceBatch, Shape, time_batch
from sgl_jax.benchmark.engine_flags import start_log
from sgl_jax.benchmark.errors import SOME_FAILED, BenchmarkError, say
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost, limits_json, share_lines
from sgl_jax.benchmark.serving_report import append_jsonl, check_writable
from sgl_jax.engine.core import Core
from sgl_jax.engine.loop import one_line
from sgl_jax.engine.messages import EngineInfo, LimitsMeasured, MeasureLimits, Refused
from sgl_jax.engine.startup import build_core
from sgl_jax.server_args import ServerArgs

TOOL = "bench_one_batch"
_DECODE_LINES = 5  # steps printed one by one
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
    if args.result_filename:
        check_writable(Path(args.result_filename), "--result-filename")
    try:
        core = build_core(server_args)
    except (ValueError, OSError) as error:  # those are for the user to mend
        raise BenchmarkError(one_line(error)) from error
    return run(args, core)


def run(args: argparse.Namespace, core: Core, clock: Callable[[], float] = time.perf_counter) -> int:
    """Everything after the start. Returns the exit code."""
    shapes = [Shape(*each) for each in itertools.product(args.batch_size, args.input_len, args.output_len)]
    for shape in shapes:
        shape.check_fits(core.info)
    source = IdSource(core.info.vocab_size, None, np.random.default_rng(args.seed))

    def timed(shape: Shape) -> BatchTimes:
        prompts = [source.ids(shape.input_len) for _ in range(shape.batch_size)]
        return time_batch(DeviceBatch(core.runner, core.info, prompts, shape.output_len), shape, clock)

    limits, cost = _measured_limits(core)
    for shape in shapes:
        timed(replace(shape, output_len=min(shape.output_len, _WARM_UP_TOKENS)))
        times = timed(shape)
        compiles = core.runner.compiles_after_ready
        print(block(times, limits, cost), flush=True)
        if args.result_filename:
            found = record(args.run_name, times, compiles, core.info, limits, cost)
            append_jsonl(Path(args.result_filename), found)
        if args.profile:
            size = f"batch{shape.batch_size}_input{shape.input_len}_output{shape.output_len}"
            with jax.profiler.trace(folder := f"{args.profile_filename_prefix or 'profile'}_{size}"):
                timed(shape)
            print(f"Trace: {folder}\n", flush=True)
    if compiles := core.runner.compiles_after_ready:
        say(TOOL, f"{compiles} programs were compiled while it was timed")
        return SOME_FAILED
    return 0


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
                say(TOOL, message)
    return None, cost


def block(times: BatchTimes, limits: MachineLimits | None, cost: ModelCost) -> str:
    """The batch for people. Labels are those that existing scripts look for."""
    shape = times.shape
    lines = [
        f"Batch size: {shape.batch_size}, input length: {shape.input_len}, output length: {shape.output_len}",
        f"Prefill. latency: {times.prefill_s:6.5f} s, throughput: {times.prefill_throughput:9.2f} token/s",
    ]
    for i, seconds in enumerate(times.decode_s[:_DECODE_LINES]):
        rate = f"latency: {seconds:6.5f} s, throughput: {shape.batch_size / seconds:9.2f} token/s"
        lines.append(f"Decode {i}. Batch size: {shape.batch_size}, {rate}")
    if times.median_decode_s is not None:
        lines.append(
            f"Decode. median latency: {times.median_decode_s:6.5f} s, "
            f"median throughput: {times.median_decode_throughput:9.2f} token/s"
        )
    lines.append(f"Total. latency: {times.total_s:6.3f} s, throughput: {times.total_throughput:9.2f} token/s")
    if limits is not None:
        shares = times.decode_bandwidth_share(cost, limits), times.prefill_matmul_share(cost, limits)
        lines += [line[0].upper() + line[1:] for line in share_lines(limits, *shares)]
    return "\n".join(lines) + "\n"


def record(
    run_name: str, times: BatchTimes, compiles: int, info: EngineInfo, limits: MachineLimits | None, cost: ModelCost
) -> dict[str, Any]:
    """The line of JSON: seconds, and tokens per second."""
    return {
        "run_name": run_name,
        "batch_size": times.shape.batch_size,
        "input_len": times.shape.input_len,
        "output_len": times.shape.output_len,
        "prefill_latency": times.prefill_s,
        "prefill_throughput": times.prefill_throughput,
        "median_decode_latency": times.median_decode_s,
        "median_decode_throughput": times.median_decode_throughput,
        "total_latency": times.total_s,
        "overall_throughput": times.total_throughput,
        "compiles_after_ready": compiles,
        "model_path": info.model_path,
        "dtype": info.dtype,
        "device_kind": info.device_kind,
        "num_devices": info.num_devices,
        "decode_bandwidth_share": limits and times.decode_bandwidth_share(cost, limits),
        "prefill_matmul_share": limits and times.prefill_matmul_share(cost, limits),
        **limits_json(limits, cost),
    }
