"""benchmarks/sweep.py: every case once, and results that survive being cut off."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Script, ScriptedServer
from virtual_time import run_in_virtual_time

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
import provenance
from sweep import GridCase, main, parse_grid, sweep

COST = {"weight_bytes": 1_000_000, "kv_bytes_per_token": 1000, "parameters_per_token": 1_000_000}
LIMITS = {
    "memory_gb_per_s": 1.0,
    "matmul_tflop_per_s": 0.01,
    "dtype": "float32",
    "device_kind": "abacus",
    "num_devices": 1,
}
ENGINE = COST | {"vocab_size": 1000}
EXACT = Script(info={"engine": ENGINE})  # first token after 100 ms, then one every 10 ms
GRID = ["--isl", "20", "--osl", "1", "11", "--concurrency", "1", "2", "--dataset-name", "random-ids"]


@dataclass
class Swept:
    code: int
    calls: list[tuple[str, Any]]
    file: Path

    @property
    def measured(self) -> list[tuple[int, int, int]]:
        """(ISL, OSL, requests) of the load that was sent in this run, case by case; warm-ups left out."""
        loads: list[list[tuple[int, int]]] = []
        for path, body in self.calls:
            if path == "/flush_cache":
                if loads:
                    loads[-1].pop()  # the request before a flush was the next case's warm-up
                loads.append([])
            elif path == "/generate":
                loads[-1].append((len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]))
        return [(*load[0], len(load)) for load in loads[1:]]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def swept(folder: Path, *flags: str, script: Script = EXACT) -> Swept:
    """A sweep of a scripted server. What is in the file already counts as measured at its address."""
    limits, file = folder / "limits.json", folder / "results.jsonl"
    limits.write_text(json.dumps(LIMITS))
    where = ("--output-file", str(file), "--machine-limits", str(limits))
    cases, args = parse_grid([*GRID, *where, *flags])
    if not script.info:  # another engine tells no cost of its model
        args.machine_limits = None

    async def beside_the_server() -> Swept:
        async with ScriptedServer(script).running() as scripted:
            args.base_url = scripted.url
            if file.exists():
                file.write_text(re.sub(r"http://127\.0\.0\.1:\d+", scripted.url, file.read_text()))
            code = await sweep(cases, args)
        return Swept(code, scripted.received, file)

    return run_in_virtual_time(beside_the_server())


TABLE = """\
| ISL | OSL | concurrency | input tok/s | output tok/s | TTFT, median (ms) | TPOT, median (ms) | ITL, p99 (ms) \
| decode, of bandwidth | of matmul rate |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| 20 | 1 | 1 | 200.0 | 10.0 | 100.0 | – | – | – | 4.2% |
| 20 | 1 | 2 | 400.0 | 20.0 | 100.0 | – | – | – | 8.4% |
| 20 | 11 | 1 | 100.0 | 55.0 | 100.0 | 10.00 | 10.00 | 10.3% | 3.1% |
| 20 | 11 | 2 | 200.0 | 110.0 | 100.0 | 10.00 | 10.00 | 10.5% | 6.2% |
"""


def test_every_case_is_measured_and_the_table_is_right_to_the_digit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = swept(tmp_path)
    assert found.measured == [(20, 1, 4), (20, 1, 6), (20, 11, 4), (20, 11, 6)]
    out, err = capsys.readouterr()
    assert out == TABLE
    assert err.splitlines()[-2:] == [
        "sweep: ISL 20, OSL 11, concurrency 2: 200.0 tok/s in, 110.0 tok/s out, TTFT 100.0 ms",
        f"sweep: the results are in {tmp_path / 'results.jsonl'}",
    ]
    assert found.code == 0


def test_the_cache_is_flushed_between_the_warm_up_and_each_case(tmp_path: Path) -> None:
    found = swept(tmp_path, "--osl", "1", "--concurrency", "1")
    paths = [path for path, _ in found.calls]
    load = ["/generate", "/flush_cache", "/metrics", *["/generate"] * 4, "/metrics"]
    assert paths == ["/get_server_info", "/v1/models", "/get_server_info", "/flush_cache", *load]


def test_a_line_of_json_says_what_was_measured_and_where(tmp_path: Path) -> None:
    record = swept(tmp_path, "--osl", "11", "--concurrency", "2", "--tag", "t").records[0]
    expected = {
        "random_input_len": 20,
        "random_output_len": 11,
        "dataset_name": "random-ids",
        "model": "scripted",
        "engine": ENGINE,
        "max_concurrency": 2,
        "num_prompts": 6,
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "completed": 6,
        "failed": 0,
        "tag": "t",
        "machine_limits": LIMITS,
        "model_cost": COST,
    }
    assert {name: record[name] for name in expected} == expected
    assert record["output_throughput"] == pytest.approx(110.0)
    assert record["median_tpot_ms"] == pytest.approx(10.0)
    assert record["decode_bandwidth_share"] == pytest.approx(0.1051)  # (1e6 + 2 x 25.5 x 1000) B / 10 ms / 1 GB/s
    assert record["matmul_share"] == pytest.approx(0.062)  # 2 x 1e6 x (120 + 66) / 0.6 s / 0.01 TFLOP/s


def test_what_is_measured_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept(tmp_path, "--osl", "1")
    capsys.readouterr()
    found = swept(tmp_path)
    assert found.measured == [(20, 11, 4), (20, 11, 6)]
    out, err = capsys.readouterr()
    assert out == TABLE
    assert "2 of 4 cases are in" in err
    assert swept(tmp_path).measured == []
    assert capsys.readouterr().out == TABLE


def test_other_settings_are_another_measurement(tmp_path: Path) -> None:
    one = ("--osl", "1", "--concurrency", "1")
    assert len(swept(tmp_path, *one).measured) == 1
    for other in (("--seed", "2"), ("--request-rate", "5"), ("--num-prompts", "5"), ("--tag", "t")):
        assert len(swept(tmp_path, *one, *other).measured) == 1, other
    for same in ((), ("--seed", "2"), ("--disable-tqdm",), ("--rounds", "4"), ("--header", "a=b")):
        assert swept(tmp_path, *one, *same).measured == [], same


def test_a_line_that_was_cut_off_costs_its_case_and_no_other(tmp_path: Path) -> None:
    swept(tmp_path)
    file = tmp_path / "results.jsonl"
    file.write_text(file.read_text()[:-40])
    assert swept(tmp_path).measured == [(20, 11, 6)]
    assert len(file.read_text().splitlines()) == 5
    assert swept(tmp_path).measured == []


def test_a_case_that_fails_is_told_the_others_go_on_and_it_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(request: int) -> tuple[int, str] | None:
        return (400, "too many") if request == 8 else None  # a request of the second case, after two warm-ups

    found = swept(tmp_path, script=Script(**vars(EXACT) | {"fails": fails}))
    assert found.code == 1
    err = capsys.readouterr().err
    assert (
        "sweep: ISL 20, OSL 1, concurrency 2 failed: 1 of 6 requests failed, the first with: "
        "HTTP 400 from /generate: too many\n" in err
    )
    assert [record["failed"] for record in found.records] == [0, 1, 0, 0]
    assert swept(tmp_path).measured == [(20, 1, 6)]


def test_a_case_that_cannot_be_run_at_all_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(**vars(EXACT) | {"fails": lambda request: (400, "too long") if request == 0 else None})
    found = swept(tmp_path, script=script)
    assert found.code == 1
    assert "concurrency 1 failed: warming up failed: HTTP 400 from /generate: too long\n" in capsys.readouterr().err
    assert len(found.records) == 3


def test_a_sweep_that_is_stopped_keeps_what_is_complete_and_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(request: int) -> None:
        if request == 8:  # as Ctrl-C does it
            next(task for task in asyncio.all_tasks() if "beside_the_server" in repr(task)).cancel()

    with pytest.raises(asyncio.CancelledError):
        swept(tmp_path, script=Script(**vars(EXACT) | {"fails": stops}))
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "| 20 | 1 | 1 | 200.0 | 10.0 | 100.0 | 4.2% |"
    assert err.splitlines()[-2] == "sweep: the same command goes on with what is left"
    assert swept(tmp_path).measured == [(20, 1, 6), (20, 11, 4), (20, 11, 6)]
    assert capsys.readouterr().out == TABLE


def test_another_engine_without_flushing_and_limits_is_measured_too(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = ScriptedServer._handle

    async def without_flush(self: ScriptedServer, request: Any) -> Any:
        response = await handle(self, request)
        if request.path == "/flush_cache":
            response.set_status(404)
        return response

    monkeypatch.setattr(ScriptedServer, "_handle", without_flush)
    flags = ("--osl", "11", "--concurrency", "1", "2", "--tokenizer", str(stories260k), "--backend", "vllm")
    found = swept(tmp_path, *flags, script=Script())
    assert [path for path, _ in found.calls].count("/flush_cache") == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "| 20 | 11 | 2 | 200.0 | 110.0 | 100.0 | 10.00 | 10.00 |"


# --- flags ------------------------------------------------------------------------------------------------------------


def test_the_published_grid_is_one_command() -> None:
    command = "--isl 1024 4096 8192 --osl 1 1024 --concurrency 8 16 32 64 128 256 --output-file f"
    grid, args = parse_grid(command.split())
    assert len(grid) == 36
    assert (grid[0], grid[-1]) == (GridCase(1024, 1, 8, 24), GridCase(8192, 1024, 256, 768))
    assert (args.random_range_ratio, args.dataset_name) == (1.0, "random")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-concurrency", "3"], "--max-concurrency is set by the cases; use --isl, --osl and --concurrency"),
        (
            ["--dataset-name", "sharegpt"],
            "--dataset-name is sharegpt; a sweep sets lengths, choose random or random-ids",
        ),
        (["--dtype", "float32"], "--dtype is not a flag; --help lists them all"),
        (["--output-file", "/none/x"], "--output-file is /none/x; it must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_honoured_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GRID, "--output-file", "f", *flags]) == 2
    assert capsys.readouterr().err == f"sweep: error: {message}\n"
