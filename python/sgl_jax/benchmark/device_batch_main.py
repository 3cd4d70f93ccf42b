"""What `python -m sgl_jax.bench_one_batch` does with its flags: every batch once, timed, printed and written down."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.device_batch import BatchTimes, DeviceBatch, check_fits, time_batch
from sgl_jax.benchmark.engine_flags import start_log
from sgl_jax.benchmark.errors import SOME_FAILED, BenchmarkError, say
from sgl_jax.benchmark.one_batch_arguments import Case, cases
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
    "dp_schedule_policy",
    "max_queued_requests",
    "enable_mixed_chunk",
    "disable_overlap_schedule",
    "decode_log_interval",
)


def measure_batches(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Starts the engine's device side and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args, _NO_SCHEDULER)
    if server_args.dp_size > 1:
        raise BenchmarkError(
            f"--dp-size is {server_args.dp_size}; this tool runs one batch on one rank, leave it out "
            "(bench_offline_throughput measures several)"
        )
    if args.result_filename:
        check_writable(Path(args.result_filename), "--result-filename")
    try:
        core = build_core(server_args)
    except (ValueError, OSError) as error:  # those are for the user to mend
        raise BenchmarkError(one_line(error)) from error
    return run(args, core)


def run(args: argparse.Namespace, core: Core, clock: Callable[[], float] = time.perf_counter) -> int:
    """Everything after the start. Returns the exit code."""
    for case in cases(args):
        check_fits(case, core.info)
    source = IdSource(core.info.vocab_size, None, np.random.default_rng(args.seed))

    def timed(case: Case) -> BatchTimes:
        prompts = [source.ids(case.input_len) for _ in range(case.batch_size)]
        return time_batch(DeviceBatch(core.runner, core.info, prompts, case.output_len), case, clock)

    limits, cost = _measured_limits(core)
    for case in cases(args):
        timed(replace(case, output_len=min(case.output_len, _WARM_UP_TOKENS)))
        times = timed(case)
        compiles = core.runner.compiles_after_ready
        print(block(times, limits, cost), flush=True)
        if args.result_filename:
            found = record(args.run_name, times, compiles, core.info, limits, cost)
            append_jsonl(Path(args.result_filename), found)
        if args.profile:
            size = f"batch{case.batch_size}_input{case.input_len}_output{case.output_len}"
            with jax.profiler.trace(folder := f"{args.profile_filename_prefix or 'profile'}_{size}"):
                timed(case)
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
    case = times.case
    lines = [
        f"Batch size: {case.batch_size}, input length: {case.input_len}, output length: {case.output_len}",
        f"Prefill. latency: {times.prefill_s:6.5f} s, throughput: {times.prefill_throughput:9.2f} token/s",
    ]
    for i, seconds in enumerate(times.decode_s[:_DECODE_LINES]):
        rate = f"latency: {seconds:6.5f} s, throughput: {case.batch_size / seconds:9.2f} token/s"
        lines.append(f"Decode {i}. Batch size: {case.batch_size}, {rate}")
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
        "batch_size": times.case.batch_size,
        "input_len": times.case.input_len,
        "output_len": times.case.output_len,
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
