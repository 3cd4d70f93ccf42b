"""`bench_serving sweep`: every case of a grid through one server, into a file of results that a later run goes on with."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgl_jax.tools.benchmark.arguments import make_parser, server_arguments
from sgl_jax.tools.benchmark.client import allow_many_connections, connect
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.figures import ServingRun, failure_line
from sgl_jax.tools.benchmark.plot import require_matplotlib, save, sweep_figure
from sgl_jax.tools.benchmark.provenance import commit, machine
from sgl_jax.tools.benchmark.server_process import StartedServer, started_server
from sgl_jax.tools.benchmark.serving import ask_server, base_url, find_tokenizer, headers, run_serving
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, Column, append_jsonl, markdown_table, say

type Record = dict[str, Any]

TOOL = "sweep"
_MIN_PROMPTS = 4  # least number in a case
# Flags of the server that say where it runs and not how.
_OF_THE_PLACE = {"host", "port", "api_key", "log_level", "compilation_cache_dir"}
# Flags that change nothing about what is measured, and those that the case and the server stand for.
_NOT_SETTINGS = {
    *("isl", "osl", "concurrency", "num_prompts", "rounds", "output_dir", "start_timeout", "model_path"),
    *("base_url", "host", "port", "header", "ready_check_timeout_sec", "profile_output_dir", "machine_limits"),
    *("disable_tqdm", "output_details"),
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


@dataclass(frozen=True)
class Case:
    isl: int  # tokens of a prompt
    osl: int  # tokens to generate
    concurrency: int  # requests at a time
    num_prompts: int

    def __str__(self) -> str:
        return f"ISL {self.isl}, OSL {self.osl}, concurrency {self.concurrency}"


def cases(args: argparse.Namespace) -> list[Case]:
    """Return the grid, in the order of the lists, concurrency changing first."""
    return [
        Case(isl, osl, concurrency, args.num_prompts or max(args.rounds * concurrency, _MIN_PROMPTS))
        for isl, osl, concurrency in itertools.product(args.isl, args.osl, args.concurrency)
    ]


def main(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Measure the grid. Returns the exit code: 0 when every case is measured, 1 when one failed."""
    server: Mapping[str, Any] | str = base_url(args)
    if args.model_path is not None:
        changed = server_arguments(server_flags).changed()
        server = {name: value for name, value in changed.items() if name not in _OF_THE_PLACE}
    sweep = Sweep(args, server)
    allow_many_connections()
    try:
        while sweep.pending:  # again, when a case was the end of a server that was started
            here = argparse.Namespace(**vars(args))
            if not server_flags:
                asyncio.run(sweep.measure(here))
                continue
            with started_server(server_flags, args.start_timeout) as started:
                key = [[("Authorization", f"Bearer {started.api_key}")]] if started.api_key else []
                here.base_url, here.header = started.url, [*args.header, *key]
                asyncio.run(sweep.measure(here, started))
    except KeyboardInterrupt:
        say(TOOL, "the same command goes on with what is left")
        raise
    finally:
        sweep.report()
    return SOME_FAILED if sweep.failed else 0


class Sweep:
    """The cases of a grid: those measured in an earlier run, those still to do, and those that failed.

    `server` is what results name it by: its URL, or the flags it is started with. The file has a line of JSON per
    measured case, under its settings; the last line of the same settings counts.
    """

    def __init__(self, args: argparse.Namespace, server: Mapping[str, Any] | str):
        self.args = args
        self._path = args.output_dir / "results.jsonl"
        self.failed: list[Case] = []
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except OSError as error:
            raise BenchmarkError(f"--output-dir: {error.filename}: {error.strerror}") from error
        self._records: list[Record] = []
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # one that was cut off
                self._records.append(json.loads(line))
        self._open_line = "\n" if text and not text.endswith("\n") else ""  # ends it: a run was killed while it wrote
        self._settings = {case: case_settings(args, case, server) for case in cases(args)}
        self.pending = deque(case for case in self._settings if self._measured(case) is None)
        if done := len(self._settings) - len(self.pending):
            say(TOOL, f"{done} of {len(self._settings)} cases are in {self._path} already and are not repeated")

    def _measured(self, case: Case) -> Record | None:
        """Return the case's result; None when it was not measured, or a request of it failed."""
        same = [record for record in self._records if record.get("settings") == self._settings[case]]
        return same[-1] if same and not same[-1].get("failed") else None

    async def measure(self, args: argparse.Namespace, started: StartedServer | None = None) -> None:
        """Take cases until none is left or the started server has ended, and set each in `args`. Failures are told.

        Raises BenchmarkError when there is no server to measure, KeyboardInterrupt when stopped.
        """
        facts = await ask_server(args)
        tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
        async with connect(base_url(args), headers(args)) as client:
            can_flush = await client.flush_cache()
        while self.pending and (started is None or started.process.poll() is None):
            case = self.pending.popleft()
            args.random_input_len, args.random_output_len = case.isl, case.osl
            args.max_concurrency, args.num_prompts = case.concurrency, case.num_prompts
            args.flush_cache = can_flush  # the warm-up's prompt, too, must not be found again
            try:
                prompts = load_prompts(args, tokenizer, facts.vocab_size, args.seed)
                run = await run_serving(args, facts, prompts, tokenizer)
            except BenchmarkError as error:
                self._fail(case, str(error))
                continue
            if run.interrupted:
                raise KeyboardInterrupt
            self._keep(case, run, started)

    def _keep(self, case: Case, run: ServingRun, started: StartedServer | None) -> None:
        record = run.json(self.args.output_details) | {
            "isl": case.isl,
            "osl": case.osl,
            "settings": self._settings[case],
            "commit": commit(),
            "machine": machine(),
            "start_seconds": None if started is None else round(started.start_seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        append_jsonl(self._path, record, before=self._open_line)
        self._open_line = ""
        self._records.append(record)
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
        """Print the table and draw the pictures, of all cases that are measured by now."""
        records = [record for case in self._settings if (record := self._measured(case)) is not None]
        if not records:
            return
        print(markdown_table(_COLUMNS, records), flush=True)
        try:
            require_matplotlib()
            for isl, osl in dict.fromkeys((record["isl"], record["osl"]) for record in records):
                of_these = [record for record in records if (record["isl"], record["osl"]) == (isl, osl)]
                save(sweep_figure(of_these), self.args.output_dir / f"isl{isl}_osl{osl}.png")
        except BenchmarkError as error:
            say(TOOL, f"no pictures: {error}, and run the same command again")


def case_settings(args: argparse.Namespace, case: Case, server: Mapping[str, Any] | str) -> Record:
    """Return the values that make two measurements the same one: the case, the server, and the flags that are not at their defaults."""
    default = make_parser(TOOL).get_default
    given = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS and value != default(name)}
    return json.loads(json.dumps({"server": server} | asdict(case) | given))  # as it is read again: lists for tuples
