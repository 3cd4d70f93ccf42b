"""The results of a sweep: a JSON line per case in a file that survives being cut off, and the table at the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.markdown import Column, markdown_table
from sgl_jax.benchmark.sweep_arguments import Case, sweep_parser

type Record = dict[str, Any]

# Flags that change nothing about what is measured, and those that the case and the server stand for.
_NOT_SETTINGS = {
    *("isl", "osl", "concurrency", "num_prompts", "rounds", "output_dir", "start_timeout", "model_path"),
    *("base_url", "host", "port", "header", "ready_check_timeout_sec", "request_timeout_sec"),
    *("profile_output_dir", "disable_tqdm", "output_details"),
}


def case_settings(args: argparse.Namespace, case: Case, server: Mapping[str, Any] | str) -> Record:
    """What makes two measurements the same one: the case, the server (its URL, or the flags it was started with), and
    the flags that are not at their defaults."""
    default = sweep_parser().get_default
    given = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS and value != default(name)}
    found = {"server": server} | asdict(case) | given
    return json.loads(json.dumps(found))  # as it is read again: lists for tuples


class Results:
    """A file of JSON lines, one object per measured case under its settings; the last one of the same settings counts."""

    def __init__(self, path: Path):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except OSError as error:
            raise BenchmarkError(f"--output-dir: {error.filename}: {error.strerror}") from error
        self._records = [record for line in text.splitlines() if (record := _read(line)) is not None]
        self._line_is_open = bool(text) and not text.endswith("\n")  # a run was killed while it wrote

    def find(self, settings: Record) -> Record | None:
        """The case's result; None when it was not measured, or a request of it failed."""
        found = None
        for record in self._records:
            if record.get("settings") == settings:
                found = record
        return None if found is None or found.get("failed") else found

    def append(self, record: Record) -> None:
        """Raises BenchmarkError when it cannot be written."""
        line = json.dumps(record) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._line_is_open else line)
        except OSError as error:
            raise BenchmarkError(f"{self._path} cannot be written: {error.strerror}") from error
        self._line_is_open = False
        self._records.append(record)


def _read(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


_COLUMNS = (
    Column("ISL", "isl"),
    Column("OSL", "osl"),
    Column("concurrency", "max_concurrency"),
    Column("input tok/s", "input_throughput", "{:,.1f}"),
    Column("output tok/s", "output_throughput", "{:,.1f}"),
    Column("TTFT, median (ms)", "median_ttft_ms", "{:,.1f}"),
    Column("TPOT, median (ms)", "median_tpot_ms", "{:,.2f}"),
    Column("ITL, p99 (ms)", "p99_itl_ms", "{:,.2f}"),
    Column("decode, of bandwidth", "decode_bandwidth_share", "{:.1%}"),
    Column("of matmul rate", "matmul_share", "{:.1%}"),
)


def table(records: Sequence[Record]) -> str:
    return markdown_table(_COLUMNS, records)
