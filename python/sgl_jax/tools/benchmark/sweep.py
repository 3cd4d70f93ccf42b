"""`bench_serving sweep`: every case of a grid through one server, into a file of results that a later run goes on with."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_jax.tools.benchmark.arguments import base_url, headers
from sgl_jax.tools.benchmark.client import allow_many_connections, connect
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.figures import ServingRun
from sgl_jax.tools.benchmark.plot import plot_sweep, require_matplotlib
from sgl_jax.tools.benchmark.provenance import command, commit, machine
from sgl_jax.tools.benchmark.server_process import StartedServer, server_arguments, started_server
from sgl_jax.tools.benchmark.serving import ask_server, find_tokenizer, run_serving
from sgl_jax.tools.benchmark.serving_report import append_jsonl, failure_line, run_json
from sgl_jax.tools.benchmark.sweep_arguments import Case, cases, parse_sweep, sweep_parser
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, Column, exit_code, markdown_table, say

type Record = dict[str, Any]

TOOL = "sweep"
RESULTS = "results.jsonl"
# Flags of the server that say where it runs and not how.
_OF_THE_PLACE = {"host", "port", "api_key", "log_level", "compilation_cache_dir"}
# Flags that change nothing about what is measured, and those that the case and the server stand for.
_NOT_SETTINGS = {
    *("isl", "osl", "concurrency", "num_prompts", "rounds", "output_dir", "start_timeout", "model_path"),
    *("base_url", "host", "port", "header", "ready_check_timeout_sec", "request_timeout_sec"),
    *("profile_output_dir", "disable_tqdm", "output_details", "machine_limits"),
}
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


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 when every case is measured, 1 when one failed, 2 for a mistake in the use, 130 when
    interrupted."""

    def run() -> int:
        args, server_flags = parse_sweep(argv)
        server: Mapping[str, Any] | str = base_url(args)
        if args.model_path is not None:
            changed = server_arguments(server_flags).changed()
            server = {name: value for name, value in changed.items() if name not in _OF_THE_PLACE}
        sweep = Sweep(args, server, command("sgl_jax.bench_serving", ["sweep", *argv]))
        allow_many_connections()
        try:
            while sweep.pending:
                _measure(sweep, server_flags)  # again, when a case was the end of a server that was started
        except KeyboardInterrupt:
            say(TOOL, "the same command goes on with what is left")
            raise
        finally:
            sweep.report()
        return SOME_FAILED if sweep.failed else 0

    return exit_code(TOOL, run)


def _measure(sweep: Sweep, server_flags: Sequence[str]) -> None:
    if not server_flags:
        asyncio.run(sweep.measure(sweep.args))
        return
    with started_server(server_flags, sweep.args.start_timeout) as server:
        here = argparse.Namespace(**vars(sweep.args) | {"base_url": server.url, "header": [*sweep.args.header]})
        if server.api_key is not None:
            here.header.append([("Authorization", f"Bearer {server.api_key}")])
        asyncio.run(sweep.measure(here, server))


class Sweep:
    """The cases of a grid: those measured in an earlier run, those still to do, and those that failed.

    `server` is what results name it by: its URL, or the flags it is started with.
    """

    def __init__(self, args: argparse.Namespace, server: Mapping[str, Any] | str, command: str):
        self.args = args
        self.failed: list[Case] = []
        self._command = command
        self._results = Results(args.output_dir / RESULTS)
        self._settings = {case: case_settings(args, case, server) for case in cases(args)}
        self.pending = deque(case for case in self._settings if self._measured(case) is None)
        self._told: set[str] = set()
        if done := len(self._settings) - len(self.pending):
            where = f"in {args.output_dir / RESULTS} already and are not repeated"
            say(TOOL, f"{done} of {len(self._settings)} cases are {where}")

    def _measured(self, case: Case) -> Record | None:
        return self._results.find(self._settings[case])

    async def measure(self, args: argparse.Namespace, started: StartedServer | None = None) -> None:
        """Takes cases until none is left or the started server has ended; failures are told, and the next case goes on.

        Raises BenchmarkError when there is no server to measure, KeyboardInterrupt when stopped.
        """
        facts = await ask_server(args)
        tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
        async with connect(base_url(args), headers(args)) as client:
            can_flush = await client.flush_cache()
        while self.pending and (started is None or started.process.poll() is None):
            case = self.pending.popleft()
            flags = argparse.Namespace(**vars(args))
            flags.random_input_len, flags.random_output_len = case.isl, case.osl
            flags.max_concurrency, flags.num_prompts = case.concurrency, case.num_prompts
            flags.flush_cache = can_flush  # what is sent before, the warm-up's prompt too, must not be found again
            try:
                prompts = load_prompts(flags, tokenizer, facts.vocab_size, flags.seed)
                run = await run_serving(flags, facts, prompts, tokenizer)
            except BenchmarkError as error:
                self._fail(case, str(error))
                continue
            if run.interrupted:
                raise KeyboardInterrupt
            self._keep(case, run, started)

    def _keep(self, case: Case, run: ServingRun, started: StartedServer | None) -> None:
        origin = {
            "isl": case.isl,
            "osl": case.osl,
            "settings": self._settings[case],
            "command": self._command,
            "commit": commit(),
            "machine": machine(),
            "start_seconds": None if started is None else round(started.start_seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._results.append(origin | run_json(run, self.args.output_details))
        for note in run.notes:
            if note not in self._told:
                self._told.add(note)
                say(TOOL, note)
        if (failure := failure_line(run)) is not None:
            self._fail(case, failure)
            return
        told = [f"{run.figures[f'{way}put_throughput']:,.1f} tok/s {way}" for way in ("in", "out")]
        for name in ("TTFT", "TPOT"):
            if (value := run.figures[f"median_{name.lower()}_ms"]) is not None:
                told.append(f"{name} {value:,.1f} ms")
        say(TOOL, f"{case}: {', '.join(told)}")

    def _fail(self, case: Case, why: str) -> None:
        self.failed.append(case)
        say(TOOL, f"{case} failed: {why}")

    def report(self) -> None:
        """Prints the table and draws the pictures, of all cases that are measured by now."""
        records = [record for case in self._settings if (record := self._measured(case)) is not None]
        if not records:
            return
        print(markdown_table(_COLUMNS, records), flush=True)
        try:
            require_matplotlib()
        except BenchmarkError as error:
            say(TOOL, f"no pictures: {error}, and run the same command again")
            return
        for isl, osl in dict.fromkeys((record["isl"], record["osl"]) for record in records):
            of_these = [record for record in records if (record["isl"], record["osl"]) == (isl, osl)]
            plot_sweep(of_these, self.args.output_dir / f"isl{isl}_osl{osl}.png")


def case_settings(args: argparse.Namespace, case: Case, server: Mapping[str, Any] | str) -> Record:
    """The values that make two measurements the same one: the case, the server, and the flags that are not at their defaults."""
    default = sweep_parser().get_default
    given = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS and value != default(name)}
    return json.loads(json.dumps({"server": server} | asdict(case) | given))  # as it is read again: lists for tuples


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
        self._open_line = "\n" if text and not text.endswith("\n") else ""  # ends it: a run was killed while it wrote

    def find(self, settings: Record) -> Record | None:
        """The case's result; None when it was not measured, or a request of it failed."""
        found = next((record for record in reversed(self._records) if record.get("settings") == settings), None)
        return None if found is None or found.get("failed") else found

    def append(self, record: Record) -> None:
        """Raises BenchmarkError when it cannot be written."""
        append_jsonl(self._path, record, before=self._open_line)
        self._open_line = ""
        self._records.append(record)


def _read(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
