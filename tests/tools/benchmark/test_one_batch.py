from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from fakes.fake_runner import FakeFlight, FakeRunner, continuation
from sgl_jax import bench_one_batch
from sgl_jax.engine import startup
from sgl_jax.engine.core import Core
from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.planning.fit import launch_of
from sgl_jax.planning.machine_rates import NotMeasured
from sgl_jax.planning.model import read_model
from sgl_jax.planning.target import target_here
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.step_plan import StepTokens
from sgl_jax.tools.benchmark import machine_limits, one_batch
from sgl_jax.tools.benchmark.arguments import Case, parse
from sgl_jax.tools.benchmark.machine_limits import MachineLimits
from sgl_jax.tools.benchmark.one_batch import check_fit, run, time_batch
from sgl_jax.tools.benchmark.terminal import BenchmarkError
from simulated import make_core, make_request

ROWS, CONTEXT, PAGE_SIZE, PAGES, CHUNK = 4, 64, 4, 40, 8
LIMITS = [
    *("--max-running-requests", ROWS, "--context-length", CONTEXT),
    *("--page-size", PAGE_SIZE, "--max-total-tokens", PAGES * PAGE_SIZE),
]


class ScriptedRunner(FakeRunner):
    """Its clock stands still, but for `seconds` that pass while the next step's tokens are waited for."""

    def __init__(self, page_size: int = PAGE_SIZE, seconds: Sequence[float] = ()):
        super().__init__(num_rows=ROWS, num_pages=PAGES + 1, page_size=page_size, context_length=CONTEXT)
        self.now = 100.0
        self.seconds = iter(seconds)
        self.outputs: dict[int, list[int]] = {}  # sampled tokens by row

    def collect(self, flight: FakeFlight) -> StepTokens:
        self.now += next(self.seconds, 0.0)
        found = super().collect(flight)
        for row, token in zip(flight.plan.rows[flight.plan.samples], found.tokens[flight.plan.samples, 0], strict=True):
            self.outputs.setdefault(int(row), []).append(int(token))
        return found


def fake_core(runner: ScriptedRunner, chunk: int = CHUNK) -> Core:
    core = make_core(
        rows=ROWS,
        context_length=CONTEXT,
        page_size=runner.page_size,
        num_usable_pages=PAGES,
        step_tokens=chunk + ROWS,
        prefill_tokens=chunk,
        radix=False,
    )
    known = {
        "page_size": runner.page_size,
        "max_running_requests": ROWS,
        "max_total_tokens": PAGES * runner.page_size,
        "chunked_prefill_size": chunk,
        "weight_bytes": 1_000_000_000,
        "kv_bytes_per_token": 1000,
        "parameters_per_token": 5_000_000_000,
    }
    return Core(core.scheduler, runner, msgspec.structs.replace(core.info, **known), overlap=False)


LIMITS_FOUND = MachineLimits(20.0, 0.5, "float32", "none", 1)


def measure(runner: ScriptedRunner, *words: object, limits=lambda *devices: LIMITS_FOUND) -> int:
    args, _ = parse("bench_one_batch", ["--model-path", "fake", *map(str, words)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_limits, "measure_limits", limits)
        return run(args, fake_core(runner), lambda: runner.now)


WARM_UP = [9.0] * 5  # 2 chunks of the prompts, 3 decode steps
TIMED = [0.125, 0.25, 0.0625, 0.125, 0.25, 0.125]
SHAPE = ("--batch-size", 2, "--input-len", 6, "--output-len", 5)


# --- what is printed and written --------------------------------------------------------------------------------------


def test_every_figure_to_the_digit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.jsonl"
    assert measure(ScriptedRunner(seconds=WARM_UP + TIMED), *SHAPE, "--run-name", "r", "--result-filename", path) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert out.out == (
        "Batch size: 2, input length: 6, output length: 5\n"
        "Prefill. latency: 0.37500 s, throughput:     32.00 token/s\n"
        "Decode 0. Batch size: 2, latency: 0.06250 s, throughput:     32.00 token/s\n"
        "Decode 1. Batch size: 2, latency: 0.12500 s, throughput:     16.00 token/s\n"
        "Decode 2. Batch size: 2, latency: 0.25000 s, throughput:      8.00 token/s\n"
        "Decode 3. Batch size: 2, latency: 0.12500 s, throughput:     16.00 token/s\n"
        "Decode. median latency: 0.12500 s, median throughput:     16.00 token/s\n"
        "Total. latency:  0.938 s, throughput:     23.47 token/s\n"  # 2 x (6 + 5) tokens in 0.9375 s
        "Decode: 40.0% of the memory bandwidth (20.0 GB/s)\n"  # 1e9 + 2 x 8.5 x 1000 bytes in 0.125 s
        "Prefill: 64.0% of the matmul rate (0.5 TFLOP/s in float32)\n\n"  # 2 x 5e9 x 12 operations in 0.375 s
    )
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "run_name": "r",
        "batch_size": 2,
        "input_len": 6,
        "output_len": 5,
        "prefill_latency": 0.375,
        "prefill_throughput": 32.0,
        "median_decode_latency": 0.125,
        "median_decode_throughput": 16.0,
        "total_latency": 0.9375,
        "overall_throughput": 22 / 0.9375,
        "compiles_after_ready": 0,
        "model_path": "fake",
        "dtype": "float32",
        "device_kind": "none",
        "num_devices": 1,
        "machine_limits": {
            "memory_gb_per_s": 20.0,
            "matmul_tflop_per_s": 0.5,
            "dtype": "float32",
            "device_kind": "none",
            "num_devices": 1,
        },
        "model_cost": {
            "weight_bytes": 1_000_000_000,
            "kv_bytes_per_token": 1000,
            "parameters_per_token": 5_000_000_000,
        },
        "decode_rows": 2,
        "decode_context": 8.5,
        "decode_bandwidth_share": pytest.approx(1_000_017_000 / 0.125 / 20e9),
        "prefill_matmul_share": pytest.approx(0.64),
    }


def test_a_single_token_has_no_decode_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.jsonl"
    shape = ("--batch-size", 2, "--input-len", 4, "--output-len", 1)
    assert measure(ScriptedRunner(seconds=[9.0, 0.5]), *shape, "--result-filename", path) == 0
    assert capsys.readouterr().out == (
        "Batch size: 2, input length: 4, output length: 1\n"
        "Prefill. latency: 0.50000 s, throughput:     16.00 token/s\n"
        "Total. latency:  0.500 s, throughput:     20.00 token/s\n"
        "Prefill: 32.0% of the matmul rate (0.5 TFLOP/s in float32)\n\n"
    )
    found = json.loads(path.read_text())
    assert found["median_decode_latency"] is found["decode_bandwidth_share"] is None


def test_without_limits_there_are_no_shares_and_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def no_room(*devices: object) -> MachineLimits:
        raise NotMeasured("the limits cannot be measured: nothing is free")

    runner, path = ScriptedRunner(seconds=WARM_UP + TIMED), tmp_path / "out.jsonl"
    assert measure(runner, *SHAPE, "--result-filename", path, limits=no_room) == 0
    out = capsys.readouterr()
    assert out.err == "bench_one_batch: the limits cannot be measured: nothing is free\n"
    assert "%" not in out.out
    assert "machine_limits" not in json.loads(path.read_text())


def test_a_compile_while_timing_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runner, path = ScriptedRunner(seconds=[1.0] * 99), tmp_path / "out.jsonl"

    def limits(*devices: object) -> MachineLimits:
        runner.compiles_after_ready = 5
        return LIMITS_FOUND

    def seconds() -> Iterator[float]:
        yield 1.0
        runner.compiles_after_ready = 7
        yield from [1.0] * 99

    runner.seconds = seconds()
    assert measure(runner, *SHAPE, "--result-filename", path, limits=limits) == 1
    assert "2 programs were compiled while it was timed" in capsys.readouterr().err
    assert json.loads(path.read_text())["compiles_after_ready"] == 2


@pytest.fixture
def plan(stories260k: Path) -> LaunchPlan:
    args = ServerArgs.from_cli(["--model-path", str(stories260k), *map(str, LIMITS)])
    return launch_of(args, read_model(args), target_here("cpu", 1))


# --- what is computed -------------------------------------------------------------------------------------------------


def expected(prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    requests = (make_request(i, prompt, temperature=0.0) for i, prompt in enumerate(prompts))
    return [continuation(request, num_tokens, 512) for request in requests]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_rows_run_together_and_their_tokens_are_right(page_size: int, chunk: int) -> None:
    runner = ScriptedRunner(page_size)
    prompts = [[7, 8, 9, 10, 11, 12, 13], [5], [21, 22, 23, 24]]
    core = fake_core(runner, chunk)
    _, decode_s = time_batch(core, prompts, output_len=6, clock=lambda: runner.now)
    assert len(decode_s) == 5
    assert [plan.num_tokens for plan in runner.plans][-5:] == [3] * 5
    for row, wanted in enumerate(expected(prompts, 40)):
        found = runner.outputs[row]
        assert len(found) >= 6
        assert found == wanted[: len(found)]
    assert not core.busy


def test_a_batch_that_cannot_run_at_once_is_said() -> None:
    prompts = [[i] * 36 for i in range(3, 3 + ROWS)]  # 4 rows of 10 pages at once, and more as they decode
    with pytest.raises(BenchmarkError, match="the batch did not run at once: raise --max-total-tokens"):
        time_batch(fake_core(ScriptedRunner()), prompts, 10)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(5, 9, 16), "it needs 5 requests at once, and 4 are possible; raise --max-running-requests"),
        (Case(1, 60, 5), "it needs 65 tokens of a request, and 64 are possible; raise --context-length"),
        (Case(4, 36, 8), "it needs 176 tokens, and 160 are possible; raise --max-total-tokens"),
    ],
)
def test_a_batch_that_does_not_fit_names_the_limit(plan: LaunchPlan, case: Case, said: str) -> None:
    with pytest.raises(BenchmarkError, match=said):
        check_fit([case], plan)


def test_a_batch_that_does_not_fit_ends_the_start(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(one_batch, "start_log", lambda *about: None)
    monkeypatch.setattr(startup, "read_weights", lambda *model: pytest.fail("weights were read"))
    monkeypatch.setattr(ModelRunner, "compile", lambda *programs: pytest.fail("programs were compiled"))
    flags = ["--model-path", stories260k, "--device", "cpu", "--compilation-cache-dir", tmp_path, *LIMITS]
    shape = ["--batch-size", 1, 5, "--input-len", 9, "--result-filename", ""]
    assert bench_one_batch.main([*map(str, flags), *map(str, shape)]) == 2
    assert "error: batch size 5, input_len 9, output_len 16: it needs 5 requests at once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--result-filename", "/none/x"), "--result-filename is /none/x; it must be a file in a folder that exists"),
        (("--profile-filename-prefix", "x"), "--profile-filename-prefix needs --profile"),
        (("--compile-only",), "--compile-only leaves nothing to measure"),
        (("--page-size", "3"), "--page-size is 3; it must be a power of two"),
        (("--pages-size", "4"), "--pages-size is not a flag, did you mean --page-size?"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(words: tuple, said: str, capsys: pytest.CaptureFixture) -> None:
    assert bench_one_batch.main(["--model-path", "m", *words]) == 2
    assert f"bench_one_batch: error: {said}" in capsys.readouterr().err


# --- the real thing ---------------------------------------------------------------------------------------------------

type Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command on a model of two step programs, compiled once."""
    compiled = tmp_path_factory.mktemp("compiled")
    flags = ["--model-path", stories260k, "--compilation-cache-dir", compiled, "--device", "cpu"]
    flags += ["--page-size", 16, "--max-running-requests", 4, "--chunked-prefill-size", 4, "--max-total-tokens", 2048]

    def call(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "sgl_jax.bench_one_batch", *map(str, flags), *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False, cwd=folder)

    return call


def test_the_command_measures_a_real_model(command: Command, tmp_path: Path) -> None:
    shape = ("--batch-size", 1, 4, "--input-len", 32, "--output-len", 8)
    result = command(tmp_path, *shape, "--profile", "--port", 1234)
    assert result.returncode == 0, result.stderr
    assert "--port has no effect" in result.stderr
    assert result.stdout.count("Prefill. latency: ") == result.stdout.count("Decode. median latency: ") == 2
    found = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    assert [(each["batch_size"], each["compiles_after_ready"]) for each in found] == [(1, 0), (4, 0)]
    for each in found:
        assert each["decode_bandwidth_share"] > 0 < each["prefill_matmul_share"]
        assert each["total_latency"] > each["prefill_latency"] > 0
    for batch_size in (1, 4):
        assert list((tmp_path / f"profile_batch{batch_size}_input32_output8").rglob("*.xplane.pb"))
