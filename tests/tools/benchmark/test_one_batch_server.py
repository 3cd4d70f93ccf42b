"""bench_one_batch_server against a server with scripted timings: every figure it prints and writes, to the digit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer
from scripted_server import Script, ScriptedServer
from virtual_time import run_in_virtual_time

from sgl_jax.bench_one_batch_server import main
from sgl_jax.tools.benchmark.arguments import Case, parse
from sgl_jax.tools.benchmark.client import ServerError, base_url
from sgl_jax.tools.benchmark.one_batch_server import BatchResult, record, run, run_case
from sgl_jax.tools.benchmark.protocols import RequestOptions
from sgl_jax.tools.benchmark.terminal import BenchmarkError

TOOL = "bench_one_batch_server"
INFO = {
    "engine": {
        "vocab_size": 1000,
        "weight_bytes": 1_000_000,
        "kv_bytes_per_token": 1000,
        "parameters_per_token": 500_000,
    }
}
LIMITS = {
    "memory_gb_per_s": 1.0,
    "matmul_tflop_per_s": 0.01,
    "dtype": "float32",
    "device_kind": "cpu",
    "num_devices": 1,
}
EXACT = Script(ttft_s=lambda request: 0.2, info=INFO)  # and 10 ms between tokens


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limits") / "limits.json"
    path.write_text(json.dumps(LIMITS))
    return path


BLOCK = """\
batch size: 4
input_len: 100
output_len: 11
latency: 0.300 s
ttft: 0.200 s
itl: 10.00 ms
input throughput: 2000.00 tok/s
output throughput: 440.00 tok/s
decode: 14.2% of the memory bandwidth (1.0 GB/s)
prefill: 20.0% of the matmul rate (0.01 TFLOP/s in float32)
cached tokens: 0 of 400

"""


DECODE = "of the memory bandwidth (1.0 GB/s)"
PREFILL = "of the matmul rate (0.01 TFLOP/s in float32)"


def measure(script: Script, *flags: str, limits: Path | None = None) -> tuple[int, list[tuple[str, Any]]]:
    """The exit code, and the calls the server got."""

    async def all_of_it() -> tuple[int, list[tuple[str, Any]]]:
        async with ScriptedServer(script).running() as server:
            args, _ = parse(TOOL, ["--base-url", server.url, "--result-filename", "", *flags])
            args.machine_limits = limits
            return await run(args), server.received

    return run_in_virtual_time(all_of_it())


def generations(calls: list[tuple[str, Any]]) -> list[Any]:
    return [body for path, body in calls if path in ("/generate", "/v1/completions")]


CASE = ("--batch-size", "4", "--input-len", "100", "--output-len", "11")


def test_a_case_is_printed_to_the_digit(limits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, calls = measure(EXACT, *CASE, limits=limits)
    assert code == 0
    assert capsys.readouterr().out == BLOCK
    assert [path for path, _ in calls] == ["/get_server_info", *["/flush_cache", "/generate"] * 2]


def test_a_case_is_written_as_a_line_of_json(tmp_path: Path, limits: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"what": "was there"}\n')
    code, _ = measure(EXACT, *CASE, "--result-filename", str(file), "--run-name", "mine", "--seed", "7", limits=limits)
    assert code == 0
    first, second = file.read_text().splitlines()
    assert first == '{"what": "was there"}'
    assert json.loads(second) == {
        "run_name": "mine",
        "simulated_acceptance": False,
        "temperature": 0.0,
        "return_logprob": False,
        "seed": 7,
        "batch_size": 4,
        "input_len": 100,
        "output_len": 11,
        "input_tokens": 400,
        "cached_tokens": 0,
        "accept_length": None,
        "latency": pytest.approx(0.3),
        "ttft": 0.2,
        "itl": pytest.approx(0.01),
        "itl_ms": pytest.approx(10.0),
        "input_throughput": 2000.0,
        "output_throughput": pytest.approx(440.0),
        "overall_throughput": pytest.approx(1480.0),
        "machine_limits": LIMITS,
        "model_cost": {"weight_bytes": 1_000_000, "kv_bytes_per_token": 1000, "parameters_per_token": 500_000},
        "decode_rows": 4,
        "decode_context": 105.5,
        "decode_bandwidth_share": pytest.approx(0.1422),  # (1e6 + 4 x (100 + 11 / 2) x 1000) B / 10 ms / 1 GB/s
        "prefill_matmul_share": 0.2,  # 2 x 500000 x 400 / 0.2 s / 0.01 TFLOP/s
    }


def test_every_combination_of_the_lists_is_a_case_and_the_report_has_a_row_each(
    limits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--batch-size", "1", "4", "--input-len", "100", "--output-len", "1", "11", "--show-report")
    code, calls = measure(EXACT, *flags, "--skip-warmup", limits=limits)
    assert code == 0
    shapes = [(len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]) for body in generations(calls)]
    assert shapes == [(1, 1), (1, 11), (4, 1), (4, 11)]
    table = capsys.readouterr().out.rpartition("\n\n")[2]
    assert table == (
        "| batch size | input_len | output_len | latency | ttft | itl | input throughput | output throughput "
        "| decode | prefill | cached tokens |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        f"| 1 | 100 | 1 | 0.200 s | 0.200 s | – | 500.00 tok/s | – | – | 5.0% {PREFILL} | 0 of 100 |\n"
        "| 1 | 100 | 11 | 0.300 s | 0.200 s | 10.00 ms | 500.00 tok/s | 110.00 tok/s "
        f"| 11.1% {DECODE} | 5.0% {PREFILL} | 0 of 100 |\n"
        f"| 4 | 100 | 1 | 0.200 s | 0.200 s | – | 2000.00 tok/s | – | – | 20.0% {PREFILL} | 0 of 400 |\n"
        "| 4 | 100 | 11 | 0.300 s | 0.200 s | 10.00 ms | 2000.00 tok/s | 440.00 tok/s "
        f"| 14.2% {DECODE} | 20.0% {PREFILL} | 0 of 400 |\n"
    )


def test_prompts_are_the_seeds_and_no_two_alike() -> None:
    def prompts(seed: str) -> list[list[int]]:
        _, calls = measure(EXACT, *CASE, "--seed", seed)
        return [prompt for body in generations(calls) for prompt in body["input_ids"]]

    first = prompts("1")
    assert len({tuple(prompt) for prompt in first}) == len(first) == 8  # warm-up and case
    assert prompts("1") == first
    assert prompts("2") != first
    assert all(0 <= token < 1000 for prompt in first for token in prompt)


def test_the_native_request_holds_the_batch_and_its_parameters() -> None:
    flags = ("--temperature", "0.5", "--return-logprob", "--skip-warmup")
    _, calls = measure(EXACT, *CASE, *flags)
    (body,) = generations(calls)
    assert [len(prompt) for prompt in body.pop("input_ids")] == [100] * 4
    assert body == {
        "stream": True,
        "return_logprob": True,
        "sampling_params": {"temperature": 0.5, "max_new_tokens": 11, "ignore_eos": True},
    }


def test_the_warm_up_is_of_the_greatest_sizes_within_bounds() -> None:
    flags = ("--batch-size", "1", "32", "--input-len", "2000", "8", "--output-len", "3")
    _, calls = measure(EXACT, *flags)
    warm_up = generations(calls)[0]
    assert [len(prompt) for prompt in warm_up["input_ids"]] == [1024] * 16
    assert warm_up["sampling_params"]["max_new_tokens"] == 3


def test_cached_tokens_are_told_and_not_counted_as_computed(limits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure(Script(**vars(EXACT) | {"cached_tokens": lambda request: 50}), *CASE, limits=limits)
    out = capsys.readouterr().out
    assert "prefill: 10.0% of the matmul rate" in out
    assert "cached tokens: 200 of 400" in out


def test_a_case_that_fails_is_told_the_others_go_on_and_the_exit_code_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = Script(**vars(EXACT) | {"fails": lambda request: (400, "too long") if request == 1 else None})
    code, calls = measure(script, "--batch-size", "1", "2", "4", "--skip-warmup")
    assert code == 1
    assert len(generations(calls)) == 3
    out, err = capsys.readouterr()
    assert err == (
        "bench_one_batch_server: batch size 2, input_len 1024, output_len 16 failed: "
        "HTTP 400 from /generate: too long\n"
    )
    assert [line for line in out.splitlines() if "batch" in line] == ["batch size: 1", "batch size: 4"]


def test_profiling_runs_each_case_once_more_in_a_trace() -> None:
    _, calls = measure(EXACT, "--batch-size", "1", "2", "--skip-warmup", "--profile", "--profile-output-dir", "/t")
    traced = ["/start_profile", "/flush_cache", "/generate", "/stop_profile"]
    assert [path for path, _ in calls][1:] == ["/flush_cache", "/generate", *traced] * 2
    assert [body for path, body in calls if path == "/start_profile"] == [{"output_dir": "/t"}] * 2


# --- one request, event by event --------------------------------------------------------------------------------------


class Events:
    """Stands in for the client: gives each event at its time."""

    def __init__(self, *events: tuple[float, dict[str, Any]]):
        self._events = events

    async def events(self, path: str, body: bytes) -> AsyncIterator[dict[str, Any]]:
        for time, event in self._events:
            await asyncio.sleep(time - asyncio.get_running_loop().time())
            yield event


def native(row: int, tokens: int, **meta: Any) -> dict[str, Any]:
    return {"index": row, "text": "", "meta_info": {"completion_tokens": tokens} | meta}


def one_request(case: Case, *events: tuple[float, dict[str, Any]]) -> BatchResult:
    client: Any = Events(*events)
    return run_in_virtual_time(run_case(client, case, [[5] * case.input_len] * case.batch_size, RequestOptions()))


def test_ttft_is_when_the_last_row_has_its_first_token() -> None:
    events = [(1.0, native(1, 1)), (1.25, native(1, 2)), (1.5, native(0, 1)), (2.0, native(0, 2))]
    result = one_request(Case(2, 10, 2), *events)
    assert (result.ttft_s, result.latency_s, record(Case(2, 10, 2), result, None)["itl"]) == (1.5, 2.0, 0.5)


def test_the_acceptance_length_is_that_of_all_rows_steps() -> None:
    def drafts(steps: int, accepted: int) -> dict[str, Any]:
        return {"spec_verify_ct": steps, "spec_proposed_drafts": 3 * steps, "spec_accepted_drafts": accepted}

    events = [
        (1.0, native(0, 2, **drafts(1, 1))),
        (1.5, native(1, 2, **drafts(1, 0))),
        (2.0, native(0, 4, **drafts(3, 2))),
    ]
    result = one_request(Case(2, 10, 4), *events, (2.5, native(1, 4, **drafts(1, 2))))
    assert record(Case(2, 10, 4), result, None)["accept_length"] == 2.0  # 3 steps and 1, which accepted 2 drafts each


def test_a_batch_that_is_not_complete_has_no_result() -> None:
    with pytest.raises(BenchmarkError, match=r"^the answer has 3 of 4 tokens$"):
        one_request(Case(2, 10, 2), (1.0, native(0, 1)), (1.5, native(1, 2)))
    with pytest.raises(BenchmarkError, match=r"^the answer has 2 of 4 tokens$"):
        one_request(Case(2, 10, 2), (1.0, native(0, 2)))


def test_a_row_that_the_server_aborts_fails_the_case() -> None:
    abort = native(1, 1, finish_reason={"type": "abort", "message": "out of pages"})
    with pytest.raises(ServerError, match=r"^the server aborted row 1: out of pages$"):
        one_request(Case(2, 10, 2), (1.0, abort))


def test_the_command_measures_the_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    sizes = ["--batch-size", "2", "--input-len", "10", "--output-len", "3", "--result-filename", str(file)]
    with LiveServer() as server:
        assert main(["--base-url", server.url, *sizes]) == 0
    assert capsys.readouterr().out.startswith("batch size: 2\ninput_len: 10\noutput_len: 3\nlatency: ")
    (line,) = file.read_text().splitlines()
    found = json.loads(line)
    assert [found[name] for name in ("batch_size", "input_tokens", "output_len", "cached_tokens")] == [2, 20, 3, 0]
    assert 0 < found["ttft"] < found["latency"]
    assert found["itl"] == pytest.approx((found["latency"] - found["ttft"]) / 2, abs=1e-6)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "1", "0"], "--batch-size: '0' is not a whole number from 1 on"),
        (["--temperature", "-1"], "--temperature: '-1' is not a number from 0 on"),
        (["--result-filename", "/none/x"], "--result-filename is /none/x; it must be a file in a folder that exists"),
        (["--base-url", "x"], "--base-url: 'x' is not a URL that begins with http:// or https://"),
        (["--zzz", "x"], "--zzz is not a flag; --help lists them all"),
    ],
)
def test_what_cannot_be_honoured_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://x", *flags]) == 2
    assert capsys.readouterr().err == f"bench_one_batch_server: error: {message}\n"


def test_published_command_lines_and_addresses_are_taken() -> None:
    args, _ = parse(TOOL, ["--model", "None", "--port", "81", "--header", "Authorization=Bearer key"])
    assert base_url(args) == "http://127.0.0.1:81"
    assert args.header == ["Authorization=Bearer key"]


@pytest.mark.parametrize("name", ["None", "Qwen/Qwen-7B-Chat", "chat"])
def test_a_model_that_the_server_has_is_taken(name: str) -> None:
    script = Script(info=INFO | {"model_path": "Qwen/Qwen-7B-Chat", "served_model_name": "chat"})
    assert measure(script, "--model-path", name)[0] == 0


def test_another_model_than_the_servers_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="--model-path is m; the server that runs has Qwen/Qwen-7B-Chat: leave"):
        measure(Script(info=INFO | {"model_path": "Qwen/Qwen-7B-Chat"}), "--model-path", "m")


def test_without_a_vocabulary_nothing_can_be_drawn() -> None:
    with pytest.raises(BenchmarkError, match="the server does not tell the size of its vocabulary"):
        measure(Script())
