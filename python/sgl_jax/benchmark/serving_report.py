"""What a serving run prints and writes: the block of lines that people compare, the machine's share, the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.figures import LATENCIES, Roofline, ServingRun, roofline_json

_WIDTH = 50
_UNKNOWN = "n/a"
_LATENCY_TITLES = {
    "e2e_latency": ("End-to-End Latency", "E2E Latency"),
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-Token Latency", "ITL"),
}


def standard_block(run: ServingRun) -> str:
    """Labels, order and widths are those that existing parsers of such blocks know."""
    return "\n".join(_standard_lines(run))


def _standard_lines(run: ServingRun) -> Iterator[str]:
    figures = run.figures
    yield heading("Serving Benchmark Result")
    yield line("Backend", run.config["backend"])
    yield line("Traffic request rate", str(run.config["request_rate"]))
    yield line("Max request concurrency", run.config["max_concurrency"] or "not set")
    yield line("Successful requests", figures.completed)
    yield line("Benchmark duration (s)", run.duration_s)
    yield line("Total input tokens", figures.total_input_tokens)
    yield line("Total generated tokens", figures.total_output_tokens)
    yield line("Total generated tokens (retokenized)", figures.total_output_tokens_retokenized)
    if figures.cache_hit_rate is not None:
        yield line("Total cached tokens", figures.total_cached_tokens)
        yield line("Cache hit rate", f"{figures.cache_hit_rate:.2%}")
    yield line("Request throughput (req/s)", figures.request_throughput)
    yield line("Input token throughput (tok/s)", figures.input_throughput)
    yield line("Output token throughput (tok/s)", figures.output_throughput)
    yield line("Peak output token throughput (tok/s)", figures.max_output_tokens_per_s)
    yield line("Total token throughput (tok/s)", figures.total_throughput)
    yield line("Concurrency", figures.concurrency)
    for name, (title, label) in _LATENCY_TITLES.items():
        yield divider(title)
        for statistic in LATENCIES[name]:
            yield line(f"{statistic.capitalize()} {label} (ms)", figures.latency[f"{statistic}_{name}_ms"])
    yield footer()


def roofline_block(roofline: Roofline) -> str:
    limits = roofline.limits
    return "\n".join(
        (
            heading("Share of the Machine"),
            line("Device", f"{limits.num_devices} x {limits.device_kind}"),
            line("Memory bandwidth (GB/s)", limits.memory_gb_per_s),
            line(f"Matmul rate, {limits.dtype} (TFLOP/s)", limits.matmul_tflop_per_s),
            line("Decode bandwidth share (%)", percent(roofline.decode_bandwidth_share)),
            line("Matmul share (%)", percent(roofline.matmul_share)),
            footer(),
        )
    )


def heading(title: str) -> str:
    return f"{f' {title} ':=^{_WIDTH}}"


def divider(title: str) -> str:
    return f"{title:-^{_WIDTH}}"


def footer() -> str:
    return "=" * _WIDTH


def line(label: str, value: str | float | None) -> str:
    """A figure with two decimals, a count as it is; None is n/a."""
    if value is None:
        value = _UNKNOWN
    shown = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
    return f"{label + ':':<40} {shown}"


def percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def failure_line(run: ServingRun) -> str | None:
    """How many requests failed, and why the first of them did."""
    first = next((outcome.error for outcome in run.outcomes if not outcome.ok), None)
    if first is None:
        return None
    return f"{run.figures.failed} of {len(run.outcomes)} requests failed, the first with: {first}"


def run_json(run: ServingRun, details: bool = False) -> dict[str, Any]:
    """The object that goes into a JSONL file; with `details` also lists with one entry per request."""
    figures = asdict(run.figures)
    latency = figures.pop("latency")
    found = run.config | {"duration": run.duration_s} | figures | latency
    if run.interrupted:
        found["interrupted"] = True
    if run.roofline is not None:
        found |= roofline_json(run.roofline)
    if details:
        outcomes = run.outcomes
        found |= {
            "input_lens": [outcome.prompt_len for outcome in outcomes],
            "output_lens": [outcome.output_len for outcome in outcomes],
            "start_times": [outcome.sent_s - run.start_s for outcome in outcomes],
            "latencies": [outcome.latency_s for outcome in outcomes],
            "ttfts": [outcome.ttft_s for outcome in outcomes],
            "itls": [outcome.itl_s for outcome in outcomes],
            "cached_tokens": [outcome.cached_tokens for outcome in outcomes],
            "generated_texts": [outcome.text for outcome in outcomes],
            "errors": [outcome.error for outcome in outcomes],
        }
    return found


def check_writable(path: Path, flag: str = "--output-file") -> None:
    """Before the run, whose result would be lost. Raises BenchmarkError."""
    if path.is_dir() or not path.parent.is_dir():
        raise BenchmarkError(f"{flag} is {path}; it must be a file in a folder that exists")


def append_jsonl(path: Path, result: dict[str, Any]) -> None:
    """Raises BenchmarkError when the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error
