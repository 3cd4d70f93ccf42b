"""What bench_one_batch writes of a batch: a block of lines for people, a line of JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from sgl_jax.benchmark.device_batch import BatchTimes
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost
from sgl_jax.engine.messages import EngineInfo

_DECODE_LINES = 5  # printed in any case


def block(times: BatchTimes, log_decode_step: int, limits: MachineLimits | None, cost: ModelCost) -> str:
    """The batch for people. Labels are those that existing scripts look for."""
    shape = times.shape
    lines = [
        f"Batch size: {shape.batch_size}, input length: {shape.input_len}, output length: {shape.output_len}",
        f"Prefill. latency: {times.prefill_s:6.5f} s, throughput: {times.prefill_throughput:9.2f} token/s",
    ]
    for i, seconds in enumerate(times.decode_s):
        if i < _DECODE_LINES or (log_decode_step and i % log_decode_step == 0):
            rate = shape.batch_size / seconds
            lines.append(
                f"Decode {i}. Batch size: {shape.batch_size}, latency: {seconds:6.5f} s, throughput: {rate:9.2f} token/s"
            )
    if times.median_decode_s is not None:
        lines.append(
            f"Decode. median latency: {times.median_decode_s:6.5f} s, "
            f"median throughput: {times.median_decode_throughput:9.2f} token/s"
        )
    lines.append(f"Total. latency: {times.total_s:6.3f} s, throughput: {times.total_throughput:9.2f} token/s")
    if limits is not None:
        if (share := times.decode_bandwidth_share(cost, limits)) is not None:
            lines.append(f"Decode: {share:.1%} of the memory bandwidth ({limits.memory_gb_per_s:.1f} GB/s)")
        share = times.prefill_matmul_share(cost, limits)
        rate = f"{limits.matmul_tflop_per_s:.3g} TFLOP/s in {limits.dtype}"
        lines.append(f"Prefill: {share:.1%} of the matmul rate ({rate})")
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
        "machine_limits": None if limits is None else msgspec.to_builtins(limits),
        "model_cost": dataclasses.asdict(cost),
        "decode_bandwidth_share": None if limits is None else times.decode_bandwidth_share(cost, limits),
        "prefill_matmul_share": None if limits is None else times.prefill_matmul_share(cost, limits),
    }
