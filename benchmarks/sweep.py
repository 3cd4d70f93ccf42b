"""Measure a server at every case of a grid of input lengths, output lengths and concurrencies, a JSON line each.

    python benchmarks/sweep.py --isl 1024 4096 --osl 1 1024 --concurrency 8 64 --output-file results.jsonl \\
        --base-url http://127.0.0.1:30000 --dataset-name random-ids

The same command goes on where it was stopped: a case whose line is in the file, without a failed request, is not repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from provenance import commit, machine

from sgl_jax.settings.flag_parser import Parser
from sgl_jax.tools.benchmark.arguments import parse
from sgl_jax.tools.benchmark.client import connect
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.door import exit_code
from sgl_jax.tools.benchmark.figures import failure_line, filled, markdown_table
from sgl_jax.tools.benchmark.serving import ask_server, described, find_tokenizer, run_serving
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, append_jsonl, check_writable, say

TOOL = "sweep"
MIN_PROMPTS = 4  # least number in a case
BY_CASE = ("random_input_len", "random_output_len", "max_concurrency")  # flags of bench_serving that a case sets
SUMMARY = "{input_throughput:,.1f} tok/s in, {output_throughput:,.1f} tok/s out, TTFT {median_ttft_ms:,.1f} ms"
COLUMNS = {
    "ISL": "{random_input_len}",
    "OSL": "{random_output_len}",
    "concurrency": "{max_concurrency}",
    "input tok/s": "{input_throughput:,.1f}",
    "output tok/s": "{output_throughput:,.1f}",
    "TTFT, median (ms)": "{median_ttft_ms:,.1f}",
    "TPOT, median (ms)": "{median_tpot_ms:,.2f}",
    "accept length": "{accept_length:.2f}",
    "ITL, p99 (ms)": "{p99_itl_ms:,.2f}",
    "decode, of bandwidth": "{decode_bandwidth_share:.1%}",
    "of matmul rate": "{matmul_share:.1%}",
}


class GridCase(NamedTuple):
    isl: int  # tokens of a prompt
    osl: int  # tokens to generate
    concurrency: int  # requests at a time
    num_prompts: int

    def __str__(self) -> str:
        return f"ISL {self.isl}, OSL {self.osl}, concurrency {self.concurrency}"

    def flags(self, args: argparse.Namespace) -> argparse.Namespace:
        """Return bench_serving's flags for this case."""
        sizes = dict(zip((*BY_CASE, "num_prompts"), self, strict=True))
        return argparse.Namespace(**vars(args) | sizes)


def parse_grid(argv: Sequence[str] | None) -> tuple[list[GridCase], argparse.Namespace]:
    """Parse a command line into the cases and bench_serving's flags. Raises FlagError for what cannot be honoured."""
    also = "Every other flag is one of bench_serving."
    parser = Parser(prog="python benchmarks/sweep.py", description=__doc__, epilog=also, allow_abbrev=False)
    for name, about in (
        ("--isl", "tokens of a prompt"),
        ("--osl", "tokens to generate"),
        ("--concurrency", "requests"),
    ):
        parser.add_argument(name, type=int, nargs="+", required=True, metavar="N", help=about)
    parser.add_argument("--output-file", required=True, metavar="FILE", help="of results, a JSON line each")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="prompts of a case are N x concurrency (3)")
    grid, rest = parser.parse_known_args(argv)
    # Lengths are exact unless asked otherwise: they name the cases.
    args, _ = parse("bench_serving", ["--random-range-ratio", "1", *rest, "--output-file", grid.output_file])
    usual, _ = parse("bench_serving", [])
    for name in BY_CASE:
        if getattr(args, name) != getattr(usual, name):
            parser.error(f"--{name.replace('_', '-')} is set by the cases; use --isl, --osl and --concurrency")
    if args.dataset_name not in ("random", "random-ids"):
        parser.error(f"--dataset-name is {args.dataset_name}; a sweep sets lengths, choose random or random-ids")
    return [
        GridCase(*sizes, args.num_prompts or max(grid.rounds * sizes[-1], MIN_PROMPTS))
        for sizes in itertools.product(grid.isl, grid.osl, grid.concurrency)
    ], args


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read what an earlier run measured. A line that was cut off is left out, and ended so that others can follow it."""
    check_writable(path, "--output-file")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(f"{text}\n", encoding="utf-8")
    results = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def find(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the last result with these settings; None if there is none, or a request of it failed."""
    same = [result for result in results if all(result.get(name) == value for name, value in settings.items())]
    return same[-1] if same and not same[-1]["failed"] else None


async def sweep(cases: Sequence[GridCase], args: argparse.Namespace) -> int:
    """Measure what is not in the file yet, and print the table. Returns the exit code: 1 when a case failed."""
    results, num_failed = read_results(args.output_file), 0
    facts = await ask_server(args)
    tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
    async with connect(args) as client:
        engine = (await client.server_info()).get("engine")
        args.flush_cache = await client.flush_cache()  # the warm-up's prompt must not be found again
    settings = {case: described(case.flags(args)) | {"model": facts.model} for case in cases}
    pending = [case for case in cases if find(results, settings[case]) is None]
    if done := len(cases) - len(pending):
        say(TOOL, f"{done} of {len(cases)} cases are in {args.output_file} already and are not repeated")
    try:
        for case in pending:
            flags = case.flags(args)
            try:
                prompts = load_prompts(flags, tokenizer, facts.vocab_size, args.seed)
                run = await run_serving(flags, facts, prompts, tokenizer)
            except BenchmarkError as error:
                say(TOOL, f"{case} failed: {error}")
                num_failed += 1
                continue
            except asyncio.CancelledError:
                say(TOOL, "the same command goes on with what is left")
                raise
            finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            about = {"engine": engine, "commit": commit(), "machine": machine(), "finished": finished}
            results.append(run.json(args.output_details) | about)
            append_jsonl(args.output_file, results[-1])
            failure = failure_line(run)
            num_failed += failure is not None
            say(TOOL, f"{case} failed: {failure}" if failure else f"{case}: {filled(SUMMARY, results[-1])}")
    finally:
        if found := [result for case in cases if (result := find(results, settings[case])) is not None]:
            print(markdown_table(COLUMNS, found), flush=True)
            say(TOOL, f"the results are in {args.output_file.resolve()}")
    return SOME_FAILED if num_failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a case failed, 2 for a mistake in the use, 130 when interrupted."""
    return exit_code(TOOL, lambda: asyncio.run(sweep(*parse_grid(argv))))


if __name__ == "__main__":
    sys.exit(main())
