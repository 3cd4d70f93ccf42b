"""The JSON of a run has the names that scripts read, and no number that JSON does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_run import COST, LIMITS, ROOFLINE, bench
from scripted_server import Script

from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError, append_jsonl, check_writable

SCRIPT = Script(
    ttft_s=lambda _: 0.25,
    itl_s=lambda _: 0.125,
    cached_tokens=lambda _: 2,
    fails=lambda request: (500, "no") if request == 1 else None,
)
PROMPTS = [Prompt([1] * 8, 8, 3)] * 2


def test_the_names_of_a_line() -> None:
    run, server = bench(SCRIPT, PROMPTS, max_concurrency=1, roofline=ROOFLINE)
    result = json.loads(json.dumps(run.json(), allow_nan=False))
    assert (
        result
        | {
            "backend": "sgl-jax",
            "base_url": server.url,
            "request_rate": "inf",
            "max_concurrency": 1,
            "num_prompts": 2,
            "duration": 0.5,
            "completed": 1,
            "failed": 1,
            "total_input_tokens": 8,
            "total_output_tokens": 3,
            "total_output_tokens_retokenized": None,
            "total_cached_tokens": 2,
            "cache_hit_rate": 0.25,
            "request_throughput": 2.0,
            "input_throughput": 16.0,
            "output_throughput": 6.0,
            "total_throughput": 22.0,
            "max_output_tokens_per_s": 3.0,
            "concurrency": 1.0,
            "mean_e2e_latency_ms": 500.0,
            "median_e2e_latency_ms": 500.0,
            "p90_e2e_latency_ms": 500.0,
            "p99_e2e_latency_ms": 500.0,
            "mean_ttft_ms": 250.0,
            "median_ttft_ms": 250.0,
            "p99_ttft_ms": 250.0,
            "mean_tpot_ms": 125.0,
            "median_tpot_ms": 125.0,
            "p99_tpot_ms": 125.0,
            "mean_itl_ms": 125.0,
            "median_itl_ms": 125.0,
            "p95_itl_ms": 125.0,
            "p99_itl_ms": 125.0,
            "max_itl_ms": 125.0,
            "machine_limits": LIMITS,
            "decode_rows": 1.0,
            "decode_context": 9.5,
        }
        == result
    )
    assert result["model_cost"] == COST
    assert "ttfts" not in result


def test_details_have_an_entry_per_request() -> None:
    run, _ = bench(SCRIPT, PROMPTS, max_concurrency=1)
    result = run.json(details=True)
    assert (result["input_lens"], result["output_lens"]) == ([8, 8], [3, 0])
    assert (result["start_times"], result["latencies"]) == ([0.0, 0.5], [0.5, 0.0])
    assert (result["ttfts"], result["itls"]) == ([0.25, None], [[0.125, 0.125], []])
    assert result["generated_texts"] == [" a a a", ""]
    assert result["errors"] == ["", "HTTP 500 from /generate: no"]


def test_without_limits_there_are_no_shares() -> None:
    run, _ = bench(Script(), PROMPTS)
    assert {"machine_limits", "model_cost", "decode_bandwidth_share", "matmul_share"} & set(run.json()) == set()


def test_runs_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    append_jsonl(file, {"a": 1})
    append_jsonl(file, {"a": 2})
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'
    check_writable(file, "--output-file")
    for bad in (tmp_path, tmp_path / "none" / "runs.jsonl"):
        with pytest.raises(BenchmarkError, match=r"--output-file is .*; it must be a file in a folder that exists"):
            check_writable(bad, "--output-file")
    append_jsonl(None, {})
    check_writable(None, "--output-file")
    with pytest.raises(BenchmarkError, match="cannot be written: No such file or directory"):
        append_jsonl(tmp_path / "none" / "runs.jsonl", {})
