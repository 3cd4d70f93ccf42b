"""The command as users run it, a process of its own, against the real HTTP server around a fake engine."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from sgl_jax.engine.messages import Generate

COMMAND = [sys.executable, "-m", "sgl_jax.bench_serving"]
RANDOM = [
    "--dataset-name",
    "random",
    "--num-prompts",
    "4",
    "--random-input",
    "20",
    "--random-output",
    "6",
    "--random-range-ratio",
    "1",
]
LABELS = [
    "Backend",
    "Traffic request rate",
    "Max request concurrency",
    "Successful requests",
    "Benchmark duration (s)",
    "Total input tokens",
    "Total generated tokens",
    "Total generated tokens (retokenized)",
    "Total cached tokens",
    "Cache hit rate",
    "Request throughput (req/s)",
    "Input token throughput (tok/s)",
    "Output token throughput (tok/s)",
    "Peak output token throughput (tok/s)",
    "Total token throughput (tok/s)",
    "Concurrency",
    *(f"{which} E2E Latency (ms)" for which in ("Mean", "Median", "P90", "P99")),
    *(f"{which} {what} (ms)" for what in ("TTFT", "TPOT") for which in ("Mean", "Median", "P99")),
    *(f"{which} ITL (ms)" for which in ("Mean", "Median", "P95", "P99", "Max")),
]


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60, check=False)


def figures(output: str) -> dict[str, str]:
    """Label to figure, of the standard block."""
    block = output.partition("============ Serving Benchmark Result ============\n")[2].partition("=" * 50)[0]
    return dict(re.findall(r"^(.+): +(\S.*?) *$", block, re.MULTILINE))


@pytest.mark.parametrize("backend", ["sgl-jax", "sgl-jax-oai", "vllm-chat"])
def test_a_run_against_the_server(live: LiveServer, tmp_path: Path, backend: str) -> None:
    """The tokenizer and the model's name are the server's own; the fake engine answers at once."""
    file = tmp_path / "out.jsonl"
    flags = ["--base-url", live.url, "--backend", backend, "--max-concurrency", "2", "--output-file", str(file)]
    result = run(*flags, *RANDOM, "--flush-cache", "--output-details", "--tag", "first")
    assert result.returncode == 0, result.stderr
    found = figures(result.stdout)
    assert list(found) == LABELS
    assert (found["Backend"], found["Max request concurrency"], found["Successful requests"]) == (backend, "2", "4")
    assert (found["Total input tokens"], found["Total generated tokens"]) == ("80", "24")
    assert "failed" not in result.stderr
    assert f"bench_serving: wrote {file}\n" in result.stderr
    (line,) = file.read_text().splitlines()
    written = json.loads(line)
    assert (written["completed"], written["total_output_tokens"], written["tag"]) == (4, 24, "first")
    assert (written["dataset_name"], written["random_input_len"], written["model"]) == ("random", 20, "stories")
    assert written["output_lens"] == [6, 6, 6, 6]


def test_failed_requests_are_in_the_exit_code(live: LiveServer) -> None:
    extra = '{"sampling_params": {"top_p": 7}}'
    result = run("--base-url", live.url, *RANDOM, "--warmup-requests", "0", "--extra-request-body", extra)
    assert result.returncode == 1
    assert figures(result.stdout)["Successful requests"] == "0"
    assert "4 of 4 requests failed, the first with: HTTP 400 from /generate: sampling_params" in result.stderr


def test_a_wrong_use_is_one_line(live: LiveServer) -> None:
    result = run("--base-url", live.url, "--dataset-name", "sharegpt")
    assert result.returncode == 2
    assert result.stderr == (
        "bench_serving: error: --dataset-name sharegpt needs --dataset-path; nothing is downloaded\n"
    )


def test_a_dead_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run("--port", str(port), *RANDOM)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"bench_serving: error: no server answers at http://127.0.0.1:{port}: Connection refused\n"
    )


def test_ctrl_c_ends_the_run_in_one_line() -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.02)) as server:
        flags = ["--base-url", server.url, *RANDOM, "--random-output", "400", "--random-range-ratio", "0"]
        process = subprocess.Popen(
            [*COMMAND, *flags, "--seed", "3", "--warmup-requests", "0", "--max-concurrency", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            end = time.monotonic() + 30
            while time.monotonic() < end and not any(isinstance(c, Generate) for c in server.core.commands):
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert (out, err) == ("", "bench_serving: interrupted\n")
