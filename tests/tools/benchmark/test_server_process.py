"""A server that a benchmark starts: reached at a free port, measured, and gone afterwards, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgl_jax.tools.benchmark.server_process import started_server
from sgl_jax.tools.benchmark.terminal import BenchmarkError

SMALL = ["--device", "cpu", "--dtype", "float32", "--context-length", "64", "--max-total-tokens", "256"]
SMALL += ["--max-running-requests", "2", "--chunked-prefill-size", "8"]


@pytest.fixture(scope="module")
def small(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Server flags; programs are compiled once for all tests here."""
    cache = tmp_path_factory.mktemp("compiled")
    return ["--model-path", str(stories260k), "--compilation-cache-dir", str(cache), *SMALL]


def test_a_batch_is_measured_through_a_server_started_from_its_flags(small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    flags = ["--batch-size", "2", "--input-len", "10", "--output-len", "3", "--result-filename", str(file)]
    limits = tmp_path / "limits.json"
    limits.write_text(
        '{"memory_gb_per_s": 20, "matmul_tflop_per_s": 1, "dtype": "float32", "device_kind": "cpu", "num_devices": 1}'
    )
    flags += ["--machine-limits", str(limits), "--api-key", "secret"]
    command = [sys.executable, "-m", "sgl_jax.bench_one_batch_server", *small, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("batch size: 2\ninput_len: 10\noutput_len: 3\nlatency: ")
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert [record[name] for name in ("batch_size", "input_tokens", "output_len", "cached_tokens")] == [2, 20, 3, 0]
    assert 0 < record["ttft"] < record["latency"] < record["start_seconds"]
    assert record["itl"] == pytest.approx((record["latency"] - record["ttft"]) / 2, abs=1e-6)
    assert record["machine_limits"]["dtype"] == "float32"
    assert record["decode_bandwidth_share"] > 0
    assert record["prefill_matmul_share"] > 0


def test_a_server_that_ends_is_told_with_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(BenchmarkError, match=r"^the server ended with code 1 before it was ready"),
        started_server(["--model-path", str(tmp_path / "none")]),
    ):
        pass
    assert "sgl_jax: error: " in capfd.readouterr().err


def test_a_port_that_is_taken_is_refused_and_its_owner_not_measured() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with (
            pytest.raises(BenchmarkError, match="choose another --port"),
            started_server(["--model", "m", "--port", port]),
        ):
            pass


def test_a_server_that_is_not_ready_in_time_is_stopped(small: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(BenchmarkError, match="--start-timeout"), started_server(small, timeout_s=0.0):
        pass
    assert time.monotonic() - start < 60


def ends_with_the_benchmark(program: str, number: int, flags: list[str]) -> None:
    """The program starts a server and prints its process id; then it gets the signal."""
    benchmark = subprocess.Popen([sys.executable, "-c", program, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert benchmark.stdout is not None
        pid = int(benchmark.stdout.readline())
        benchmark.send_signal(number)
        benchmark.wait(30)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        benchmark.kill()
        benchmark.communicate()


def test_ctrl_c_stops_the_server(small: list[str]) -> None:
    program = (
        "import sys, time\n"
        "from sgl_jax.tools.benchmark.server_process import started_server\n"
        "with started_server(sys.argv[1:]) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    ends_with_the_benchmark(program, signal.SIGINT, small)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_the_server_while_it_starts(number: int, small: list[str]) -> None:
    program = (
        "import sys\n"
        "from sgl_jax.tools.benchmark import server_process\n"
        "wait = server_process._wait_ready\n"
        "def told(process, *more):\n"
        "    print(process.pid, flush=True)\n"
        "    wait(process, *more)\n"
        "server_process._wait_ready = told\n"
        "with server_process.started_server(sys.argv[1:]):\n"
        "    pass\n"
    )
    ends_with_the_benchmark(program, number, small)
