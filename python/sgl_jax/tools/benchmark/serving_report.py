"""Output of a run: the block of lines that people compare, the machine's share, the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgl_jax.tools.benchmark.figures import LATENCIES, ServingRun
from sgl_jax.tools.benchmark.terminal import BenchmarkError

type Rows = Mapping[str, str | float | None]  # by label

_WIDTH = 50


def block(title: str, rows: Rows, sections: Mapping[str, Rows] | None = None) -> str:
    """Labels, order and widths are those that existing parsers of such blocks know."""
    lines = [f"{f' {title} ':=^{_WIDTH}}", *_lines(rows)]
    for section, more in (sections or {}).items():
        lines += [f"{section:-^{_WIDTH}}", *_lines(more)]
    return "\n".join([*lines, "=" * _WIDTH])


def _lines(rows: Rows) -> list[str]:
    """A figure with two decimals, a count as it is; None is n/a."""
    shown = {
        label: f"{value:.2f}" if isinstance(value, float) else "n/a" if value is None else str(value)
        for label, value in rows.items()
    }
    return [f"{label + ':':<40} {value:<10}" for label, value in shown.items()]


_LABELS = {  # of all tools' figures
    "completed": "Successful requests",
    "successful_requests": "Successful requests",
    "duration": "Benchmark duration (s)",
    "total_latency": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "total_output_tokens_retokenized": "Total generated tokens (retokenized)",
    "total_cached_tokens": "Total cached tokens",
    "cache_hit_rate": "Cache hit rate",
    "last_gen_throughput": "Last generation throughput (tok/s)",
    "request_throughput": "Request throughput (req/s)",
    "input_throughput": "Input token throughput (tok/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "total_throughput": "Total token throughput (tok/s)",
    "concurrency": "Concurrency",
}


def labelled(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that a block shows, in its order."""
    return {label: found[name] for name, label in _LABELS.items() if name in found}


def standard_block(run: ServingRun) -> str:
    found = run.figures | {"duration": run.duration_s}
    if found["cache_hit_rate"] is None:  # the server does not tell
        del found["total_cached_tokens"], found["cache_hit_rate"]
    else:
        found["cache_hit_rate"] = f"{found['cache_hit_rate']:.2%}"
    rows = {
        "Backend": run.config["backend"],
        "Traffic request rate": str(run.config["request_rate"]),
        "Max request concurrency": run.config["max_concurrency"] or "not set",
        **labelled(found),
    }
    sections = {
        of.title: {f"{each.capitalize()} {of.label} (ms)": found[f"{each}_{name}_ms"] for each in of.statistics}
        for name, of in LATENCIES.items()
    }
    return block("Serving Benchmark Result", rows, sections)


def shares_block(shares: Mapping[str, Any]) -> str:
    limits = shares["machine_limits"]
    rows = {
        "Device": f"{limits['num_devices']} x {limits['device_kind']}",
        "Memory bandwidth (GB/s)": limits["memory_gb_per_s"],
        f"Matmul rate, {limits['dtype']} (TFLOP/s)": limits["matmul_tflop_per_s"],
        "Decode bandwidth share (%)": _percent(shares["decode_bandwidth_share"]),
        "Matmul share (%)": _percent(shares["matmul_share"]),
    }
    return block("Share of the Machine", rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def failure_line(run: ServingRun) -> str | None:
    """How many requests failed, and why the first of them did."""
    first = next((outcome.error for outcome in run.outcomes if not outcome.ok), None)
    if first is None:
        return None
    return f"{run.figures['failed']} of {len(run.outcomes)} requests failed, the first with: {first}"


def run_json(run: ServingRun, details: bool = False) -> dict[str, Any]:
    """The object that goes into a JSONL file; with `details` also lists with one entry per request."""
    found = run.config | {"duration": run.duration_s} | run.figures | (run.shares or {})
    if run.interrupted:
        found["interrupted"] = True
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


def check_writable(path: Path | None, flag: str) -> None:
    """Before the run, whose result would be lost. Raises BenchmarkError. None: nothing is to be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise BenchmarkError(f"{flag} is {path}; it must be a file in a folder that exists")


def append_jsonl(path: Path | None, result: Mapping[str, Any], before: str = "") -> None:
    """A line, `before` ahead of it; none without a path. Raises BenchmarkError when the file cannot be written."""
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{before}{json.dumps(result)}\n")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error
