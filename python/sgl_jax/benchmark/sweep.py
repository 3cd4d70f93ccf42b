"""`bench_serving sweep`: every case of a grid through one server, into a file of results that a later run goes on with."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from sgl_jax.benchmark import datasets
from sgl_jax.benchmark.arguments import base_url, headers
from sgl_jax.benchmark.client import NOT_OFFERED, ServerError, allow_many_connections, connect
from sgl_jax.benchmark.errors import SOME_FAILED, BenchmarkError, exit_code, say
from sgl_jax.benchmark.figures import ServingRun
from sgl_jax.benchmark.plot import require_matplotlib
from sgl_jax.benchmark.provenance import command, commit, machine
from sgl_jax.benchmark.server_process import StartedServer, server_arguments, started_server
from sgl_jax.benchmark.serving import run_serving
from sgl_jax.benchmark.serving_main import (
    ask_server,
    data_settings,
    find_tokenizer,
    serving_config,
)
from sgl_jax.benchmark.serving_report import failure_line, run_json
from sgl_jax.benchmark.sweep_arguments import Case, case_arguments, cases, parse_sweep
from sgl_jax.benchmark.sweep_plot import plot_sweep
from sgl_jax.benchmark.sweep_results import Record, Results, case_settings, table

TOOL = "sweep"
RESULTS = "results.jsonl"
# Flags of the server that say where it runs and not how.
_OF_THE_PLACE = {"host", "port", "api_key", "log_level", "compilation_cache_dir"}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 when every case is measured, 1 when one failed, 2 for a mistake in the use, 130 when
    interrupted."""
    args, server_flags = parse_sweep(argv)

    def run() -> int:
        server = _described(args, server_flags)
        sweep = Sweep(args, server, command("sgl_jax.bench_serving", ["sweep", *argv]))
        try:
            return _run(sweep, server_flags)
        except KeyboardInterrupt:
            say(TOOL, "the same command goes on with what is left")
            raise
        finally:
            sweep.report()

    return exit_code(TOOL, run)


def _described(args: argparse.Namespace, server_flags: Sequence[str]) -> dict[str, Any] | str:
    """The server as results name it: its URL, or the flags it is started with."""
    if args.model_path is None:
        return base_url(args)
    changed = server_arguments(server_flags).changed()
    return {name: value for name, value in changed.items() if name not in _OF_THE_PLACE}


def _run(sweep: Sweep, server_flags: Sequence[str]) -> int:
    allow_many_connections()
    args = sweep.args
    while sweep.pending:
        if not server_flags:
            asyncio.run(sweep.measure(args))
            continue
        with started_server(server_flags, args.start_timeout) as server:  # again, when a case was its end
            here = argparse.Namespace(**vars(args) | {"base_url": server.url, "header": [*args.header]})
            if server.api_key is not None:
                here.header.append([("Authorization", f"Bearer {server.api_key}")])
            asyncio.run(sweep.measure(here, server))
    return SOME_FAILED if sweep.failed else 0


class Sweep:
    """The cases of a grid: those measured in an earlier run, those still to do, and those that failed."""

    def __init__(self, args: argparse.Namespace, server: Mapping[str, Any] | str, command: str):
        self.args = args
        self.failed: list[Case] = []
        self._command = command
        self._results = Results(args.output_dir / RESULTS)
        self._settings = {case: case_settings(args, case, server) for case in cases(args)}
        self.pending = deque(case for case in self._settings if self._measured(case) is None)
        self._told: set[str] = set()
        if done := len(self._settings) - len(self.pending):
            say(
                TOOL,
                f"{done} of {len(self._settings)} cases are in {args.output_dir / RESULTS} already and are not repeated",
            )

    def _measured(self, case: Case) -> Record | None:
        return self._results.find(self._settings[case])

    async def measure(self, args: argparse.Namespace, started: StartedServer | None = None) -> None:
        """Takes cases until none is left or the started server has ended; failures are told, and the next case goes on.

        Raises BenchmarkError when there is no server to measure, KeyboardInterrupt when stopped.
        """
        facts = await ask_server(args)
        tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
        can_flush = await _can_flush(args)
        while self.pending and (started is None or started.process.poll() is None):
            case = self.pending.popleft()
            flags = case_arguments(args, case)
            flags.flush_cache = can_flush  # what is sent before, the warm-up's prompt too, must not be found again
            try:
                prompts = datasets.load_prompts(flags, tokenizer, facts.vocab_size, flags.seed)
                run = await run_serving(serving_config(flags, facts), prompts, tokenizer, data_settings(flags))
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
        f = run.figures
        told = [f"{f.input_throughput:,.1f} tok/s in", f"{f.output_throughput:,.1f} tok/s out"]
        for name in ("TTFT", "TPOT"):
            if (value := f.latency[f"median_{name.lower()}_ms"]) is not None:
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
        print(table(records), flush=True)
        try:
            require_matplotlib()
        except BenchmarkError as error:
            say(TOOL, f"no pictures: {error}, and run the same command again")
            return
        for isl, osl in dict.fromkeys((record["isl"], record["osl"]) for record in records):
            of_these = [record for record in records if (record["isl"], record["osl"]) == (isl, osl)]
            plot_sweep(of_these, self.args.output_dir / f"isl{isl}_osl{osl}.png")


async def _can_flush(args: argparse.Namespace) -> bool:
    """Whether the server has /flush_cache."""
    async with connect(base_url(args), headers(args)) as client:
        try:
            await client.flush_cache()
        except ServerError as error:
            if error.status in NOT_OFFERED:
                return False
            raise
    return True
