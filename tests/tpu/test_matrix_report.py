"""The committed report of compiled programs, and the table that is made of it."""

from __future__ import annotations

import matrix_report
import pytest


def test_the_table_is_that_of_the_report() -> None:
    assert matrix_report.REPORT.with_suffix(".md").read_text(encoding="utf-8") == matrix_report.table(
        matrix_report.read()
    )


def test_every_case_has_a_line_and_says_what_became_of_it() -> None:
    program = {"temp_bytes": 30_000_000, "code_bytes": 8_000_000}
    done = {
        "date": "2026-01-02",
        "versions": {"libtpu": "1"},
        "programs": [program, program],
        "faults": ["tokens=8 rows=8: the pool is copied by copy.1"],
        "cpu_seconds": 12.3,
        "kv_bytes": 1_000_000_000,
    }
    large = {"date": "2026-01-03", "versions": {"libtpu": "1"}, "misfit": "no room for KV"}
    lines = matrix_report.table({"Qwen3-8B v6e-4": done, "Qwen3-32B v6e-1": large}).splitlines()
    assert "| Qwen3-8B | v6e-4 | 2 | 1 | 12 | 16 | 30 (3.00) | 2026-01-02 |" in lines
    assert "| Qwen3-32B | v6e-1 | does not fit | | | | | 2026-01-03 |" in lines
    assert "- Qwen3-8B v6e-4, tokens=8 rows=8: the pool is copied by copy.1" in lines
    assert sum("not yet compiled" in line for line in lines) == 23
    assert "Versions: libtpu 1" in lines


def test_adding_a_launch_keeps_the_others(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_report, "REPORT", tmp_path / "tpu_programs.json")
    entry = {"date": "2026-01-03", "versions": {"libtpu": "1"}, "misfit": "no room for KV"}
    matrix_report.add("Qwen3-32B", "v6e-1", entry)
    matrix_report.add("Qwen3-8B", "v6e-1", entry)
    matrix_report.add("Qwen3-32B", "v6e-1", entry | {"date": "2026-01-04"})
    assert list(matrix_report.read()) == ["Qwen3-8B v6e-1", "Qwen3-32B v6e-1"]
    assert matrix_report.read()["Qwen3-32B v6e-1"]["date"] == "2026-01-04"
    assert (tmp_path / "tpu_programs.md").read_text() == matrix_report.table(matrix_report.read())
