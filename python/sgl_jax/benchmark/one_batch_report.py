"""What bench_one_batch_server writes of a case: a line of JSON, a block of text, a row of a markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from sgl_jax.benchmark.markdown import Column, markdown_table
from sgl_jax.benchmark.one_batch import BatchResult
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost

type Record = dict[str, Any]

_SETTINGS = ("run_name", "api_type", "temperature", "return_logprob", "client_stream_interval", "seed")


def make_record(
    settings: Mapping[str, Any],
    result: BatchResult,
    last_gen_throughput: float | None,
    limits: MachineLimits | None,
    cost: ModelCost | None,
    start_seconds: float | None,
) -> Record:
    """Times in seconds, throughputs in tokens per second; None where there is nothing to tell."""
    decode = prefill = None
    if limits is not None and cost is not None:
        decode, prefill = result.decode_bandwidth_share(cost, limits), result.prefill_matmul_share(cost, limits)
    return {
        **{name: settings[name] for name in _SETTINGS},
        "batch_size": result.case.batch_size,
        "input_len": result.case.input_len,
        "input_len_step_percentage": result.case.input_step,
        "output_len": result.case.output_len,
        "input_tokens": result.input_tokens,
        "cached_tokens": result.cached_tokens,
        "latency": _rounded(result.latency_s),
        "ttft": _rounded(result.ttft_s),
        "itl": _rounded(result.itl_s),
        "input_throughput": _rounded(result.input_throughput),
        "output_throughput": _rounded(result.output_throughput),
        "overall_throughput": _rounded(result.overall_throughput),
        "last_gen_throughput": _rounded(last_gen_throughput),
        "start_seconds": _rounded(start_seconds),
        "machine_limits": None if limits is None else msgspec.to_builtins(limits),
        "model_cost": None if cost is None else asdict(cost),
        "decode_bandwidth_share": _rounded(decode),
        "prefill_matmul_share": _rounded(prefill),
    }


def block(record: Record) -> str:
    """The case for people, a figure a line."""
    limits = record["machine_limits"] or {}
    lines = [
        f"batch size: {record['batch_size']}",
        f"input_len: {record['input_len']}",
        f"output_len: {record['output_len']}",
        f"latency: {record['latency']:.3f} s",
        f"ttft: {record['ttft']:.3f} s",
    ]
    if record["itl"] is not None:
        lines.append(f"itl: {record['itl'] * 1e3:.2f} ms")
    if record["last_gen_throughput"] is not None:
        lines.append(f"last generation throughput: {record['last_gen_throughput']:.2f} tok/s")
    lines.append(f"input throughput: {record['input_throughput']:.2f} tok/s")
    if record["output_throughput"] is not None:
        lines.append(f"output throughput: {record['output_throughput']:.2f} tok/s")
    if (share := record["decode_bandwidth_share"]) is not None:
        lines.append(f"decode: {share:.1%} of the memory bandwidth ({limits['memory_gb_per_s']:.1f} GB/s)")
    if (share := record["prefill_matmul_share"]) is not None:
        rate = f"{limits['matmul_tflop_per_s']:.3g} TFLOP/s in {limits['dtype']}"
        lines.append(f"prefill: {share:.1%} of the matmul rate ({rate})")
    if record["cached_tokens"]:
        lines.append(f"cached tokens: {record['cached_tokens']} of {record['input_tokens']}, not computed again")
    return "\n".join(lines) + "\n"


_COLUMNS = (
    Column("batch size", "batch_size"),
    Column("input len", "input_len"),
    Column("output len", "output_len"),
    Column("latency (s)", "latency", "{:.3f}"),
    Column("ttft (s)", "ttft", "{:.3f}"),
    Column("input throughput (tok/s)", "input_throughput", "{:.2f}"),
    Column("output throughput (tok/s)", "output_throughput", "{:.2f}"),
    Column("ITL (ms)", "itl", "{:.2f}", 1e3),
    Column("decode, of memory bandwidth", "decode_bandwidth_share", "{:.1%}"),
    Column("prefill, of matmul rate", "prefill_matmul_share", "{:.1%}"),
)


def report(records: Sequence[Record]) -> str:
    """All cases as a markdown table."""
    return markdown_table(_COLUMNS, records)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
