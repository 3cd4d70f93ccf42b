"""benchmarks/first_day.py: a JSON whatever fails, and an exit code that tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import first_day
import pytest

TINY = ["--max-running-requests", "1", "--context-length", "16", "--max-total-tokens", "64", "--dtype", "float32"]


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(stories260k: Path, tmp_path: Path, capsys) -> None:
    out, model = tmp_path / "first_day.json", ["--device", "cpu", "--model-path", str(stories260k)]
    code = first_day.main([*model, *TINY, "--out", str(out), "--parts", "exactness", "steps", "--minutes", "3"])
    found = json.loads(out.read_text(encoding="utf-8"))
    parts = found["parts"]
    assert (code, parts["exactness"]["status"], parts["steps"]["status"]) == (1, "failed", "passed")
    assert "`reference`" in parts["exactness"]["error"]
    assert {"commit", "machine", "versions", "command", "seconds"} <= found.keys()
    steps = parts["steps"]["found"]["steps"]
    assert [(step["kind"], step["computed_tokens"]) for step in steps] == [
        ("decode" if step["tokens"] == 1 else "prompt", step["tokens"]) for step in steps
    ]
    for step in steps:
        least = max(step[f"{resource}_seconds"] for resource in ("compute", "memory", "links"))
        assert step["least_seconds"] == least <= step["in_turn_seconds"]
        assert step["share"] == least / step["median_seconds"]
        assert len(step["seconds"]) == 5
    assert parts["steps"]["found"]["compiles_after_ready"] == 0
    assert [row["what"] for row in found["table"]] == [f"step {step['program']}" for step in steps]
    assert capsys.readouterr().out.count("| step tokens=") == len(steps)


def script(folder: Path, source: str) -> Path:
    (file := folder / "part.py").write_text(f"import pathlib, sys, time\nname, folder = sys.argv[1:3]\n{source}")
    return file


def test_what_an_ended_part_had_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "pathlib.Path(folder, name + '.json').write_text('{\"a\": 1}')\ntime.sleep(60)"
    monkeypatch.setattr(first_day, "PARTS_SCRIPT", script(tmp_path, source))
    monkeypatch.setattr(first_day, "LEAST_S", 0.0)
    record = first_day.run_part("steps", tmp_path, 1.5, "", [])
    assert (record["status"], record["found"]) == ("failed", {"a": 1})
    assert record["error"] == "not done in 2 s"


def test_a_part_that_dies_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_day, "PARTS_SCRIPT", script(tmp_path, "sys.exit('no chip\\nat all')"))
    record = first_day.run_part("steps", tmp_path, 30, "", [])
    assert (record["status"], record["error"]) == ("failed", "ended with exit code 1: at all")
    assert record["log"] == ["no chip", "at all"]


def test_a_part_without_time_is_not_run(tmp_path: Path) -> None:
    out = tmp_path / "first_day.json"
    assert first_day.main(["--out", str(out), "--minutes", "0.001", "--api-key", "hunter2"]) == 1
    assert "--api-key (hidden)" in out.read_text(encoding="utf-8")
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert parts == {name: {"status": "not run", "error": "no time left"} for name in first_day.WEIGHTS}


def test_batches_are_set_beside_the_rates_that_were_measured() -> None:
    line = {"batch_size": 4, "input_len": 64, "prefill_latency": 0.5, "median_decode_latency": 0.01}
    shares = {"prefill_matmul_share": 0.5, "decode_bandwidth_share": 0.25}
    parts = {"one_batch": {"found": {"lines": [line | shares, line]}}}
    prefill, decode, *unknown = first_day.table_of(parts)
    assert prefill == {"what": "batch 4 x 64, prefill", "predicted_ms": 250, "measured_ms": 500, "share": 0.5}
    assert decode == {"what": "batch 4 x 64, decode", "predicted_ms": 2.5, "measured_ms": 10, "share": 0.25}
    assert [row["predicted_ms"] for row in unknown] == [None, None]


@pytest.mark.parametrize("flags", [["--page-sise", "16"], ["--dp-size", "2"], ["--minutes", "0"], ["--parts", "all"]])
def test_a_mistake_is_refused_before_anything_runs(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(first_day, "run_part", lambda *_: sys.exit("a part was run"))
    assert first_day.main(["--out", str(tmp_path / "o.json"), *flags]) == 2
