"""`python -m sgl_jax.bench_one_batch_server`: batches of one size and length, one after the other, through a server."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.benchmark.client import Client, ServerError, connect, model_cost
from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.one_batch import BatchOptions, BatchResult, Case, run_case
from sgl_jax.benchmark.one_batch_report import Record, block, make_record, report
from sgl_jax.benchmark.server_process import START_TIMEOUT_S, StartedServer, started_server
from sgl_jax.flags import FlagError, read_command_line
from sgl_jax.server_args import FLAGS

FAILED, INTERRUPTED = 1, 130  # exit codes
_READY_TIMEOUT_S = 60.0
_WARM_UP = Case(16, 1024, 16)  # at most
_DESCRIPTION = """Measure the latency and throughput of single batches through a server: the one at --base-url, or one
that is started for it, and then every flag of the server is taken as well (python -m sgl_jax.launch_server --help)."""
# Flags of the server that say something about one that runs. --model is in published command lines beside --base-url;
# that server has its model.
_WITH_BASE_URL = {"model_path", "served_model_name", "tokenizer_path", "api_key"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when every case was measured."""
    try:
        args, server_flags = _parser().parse_known_args(argv)
        _check(args)
        if args.base_url:
            target = _target(args.base_url, server_flags)
            return asyncio.run(run(args, target))
        with started_server(server_flags, args.start_timeout) as server:
            return asyncio.run(run(args, Target(server.url, server.api_key, started=server)))
    except BenchmarkError as error:
        print(f"sgl_jax: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


@dataclass(frozen=True)
class Target:
    """The server to measure."""

    base_url: str
    api_key: str | None = None
    served_model_name: str | None = None  # None: the first that the server lists
    tokenizer_path: str | None = None  # tells the vocabulary where the server does not
    started: StartedServer | None = None


async def run(args: argparse.Namespace, target: Target) -> int:
    """Measures every case, prints it and appends it to the file. Returns the exit code."""
    cases = [
        Case(*sizes, args.input_len_step_percentage)
        for sizes in itertools.product(args.batch_size, args.input_len, args.output_len)
    ]
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with connect(target.base_url, headers) as client:
        await client.wait_until_ready(_READY_TIMEOUT_S)
        info = await client.server_info()
        source = _id_source(info, target.tokenizer_path, args.seed)
        model = None
        if args.api_type == "openai":
            model = target.served_model_name or await client.model_name()
        options = BatchOptions(args.api_type, model, args.temperature, args.return_logprob, args.client_stream_interval)
        if not args.skip_warmup:
            await _warm_up(client, cases, source, options)
        limits = await client.measure_limits()
        cost = None if limits is None else model_cost(info)
        start_seconds = target.started and target.started.start_seconds
        records: list[Record] = []
        for case in cases:
            try:
                result = await _measure(client, case, source, options)
            except BenchmarkError as error:
                if target.started:
                    target.started.check()
                print(f"sgl_jax: error: {case}: {error}", file=sys.stderr)
                continue
            throughput = _last_gen_throughput(await client.server_info())
            records.append(make_record(vars(args), result, throughput, limits, cost, start_seconds))
            print(block(records[-1]), flush=True)
            if args.result_filename:
                with Path(args.result_filename).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(records[-1]) + "\n")
        if args.show_report and records:
            print(report(records))
        if args.profile:
            await _profile(client, cases, source, options, args.profile_output_dir)
    return 0 if len(records) == len(cases) else FAILED


async def _warm_up(client: Client, cases: Sequence[Case], source: IdSource, options: BatchOptions) -> None:
    """One request of the cases' greatest sizes, within bounds; not measured."""
    case = Case(
        min(_WARM_UP.batch_size, max(case.batch_size for case in cases)),
        min(_WARM_UP.input_len, max(case.input_len for case in cases)),
        min(_WARM_UP.output_len, max(case.output_len for case in cases)),
    )
    try:
        await _measure(client, case, source, options)
    except BenchmarkError as error:
        raise BenchmarkError(f"warming up with {case} failed: {error}") from error


async def _measure(client: Client, case: Case, source: IdSource, options: BatchOptions) -> BatchResult:
    try:
        await client.flush_cache()
    except ServerError as error:
        if error.status not in (404, 405, 501):  # without it: the prompts are new, so there is little to find
            raise
    return await run_case(client, case, [source.ids(length) for length in case.input_lens()], options)


async def _profile(
    client: Client, cases: Sequence[Case], source: IdSource, options: BatchOptions, output_dir: str | None
) -> None:
    """Every case once more, each in a trace of its own: what is measured runs without the profiler."""
    for case in cases:
        await client.start_profile(output_dir)
        try:
            await _measure(client, case, source, options)
        finally:
            await client.stop_profile()


def _id_source(info: Mapping[str, Any], tokenizer_path: str | None, seed: int) -> IdSource:
    tokenizer = None
    if tokenizer_path is not None:
        from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

        try:
            tokenizer = load_tokenizer(tokenizer_path)
        except TokenizerError as error:
            raise BenchmarkError(f"--tokenizer-path: {error}") from error
    vocab_size = (info.get("engine") or {}).get("vocab_size")
    if vocab_size is None and tokenizer is None:
        raise BenchmarkError("the server does not tell the size of its vocabulary; give --tokenizer-path")
    return IdSource(vocab_size, tokenizer, np.random.default_rng(seed))


def _last_gen_throughput(info: Mapping[str, Any]) -> float | None:
    states = info.get("internal_states") or [{}]
    return states[0].get("last_gen_throughput")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_jax.bench_one_batch_server",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base-url", default="", metavar="URL", help="a server that runs (default: one is started)")
    add("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="prompts in a request (default: 1)")
    add("--input-len", type=int, nargs="+", default=[1024], metavar="N", help="tokens of a prompt (default: 1024)")
    add("--output-len", type=int, nargs="+", default=[16], metavar="N", help="tokens to generate (default: 16)")
    add(
        "--input-len-step-percentage",
        type=float,
        default=0.0,
        metavar="X",
        help="each prompt of a batch is X times --input-len longer than the one before, the mean staying the same: "
        "0.1 is 10 %% (default: 0, all alike)",
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    add("--return-logprob", action="store_true", help="ask for the log probabilities of the output")
    add(
        "--client-stream-interval",
        type=int,
        default=1,
        metavar="N",
        help="tokens per streamed event that the request asks for; native API only (default: 1)",
    )
    add("--api-type", choices=("native", "openai"), default="native", help="/generate or /v1/completions")
    add("--seed", type=int, default=1, metavar="N", help="of the random prompts (default: 1)")
    add("--skip-warmup", action="store_true", help="measure from the first request on")
    add("--profile", action="store_true", help="then run each case once more in a trace (POST /start_profile)")
    add("--profile-output-dir", metavar="PATH", help="where the server writes the traces (default: its own choice)")
    add("--run-name", default="default", metavar="NAME", help="a name for the results (default: default)")
    add(
        "--result-filename",
        default="result.jsonl",
        metavar="FILE",
        help="one JSON object per case is appended; '' for none (default: result.jsonl)",
    )
    add("--show-report", action="store_true", help="print all cases as a markdown table at the end")
    add(
        "--start-timeout",
        type=float,
        default=START_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long the server that is started may take (default: {START_TIMEOUT_S:g})",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises BenchmarkError for the first value that cannot be honoured."""
    for name in ("batch_size", "input_len", "output_len"):
        if min(values := getattr(args, name)) < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {min(values)}; it must be at least 1")
    if args.temperature < 0:
        raise BenchmarkError(f"--temperature is {args.temperature}; it must be 0 or more")
    if args.client_stream_interval < 1:
        raise BenchmarkError(f"--client-stream-interval is {args.client_stream_interval}; it must be at least 1")
    if args.client_stream_interval != 1 and args.api_type == "openai":
        raise BenchmarkError(
            f"--client-stream-interval is {args.client_stream_interval}; OpenAI's API has no such parameter, "
            "use --api-type native"
        )
    step = args.input_len_step_percentage
    for batch_size, input_len in itertools.product(args.batch_size, args.input_len):
        shortest = min(Case(batch_size, input_len, 1, step).input_lens())
        if shortest < 1:
            raise BenchmarkError(
                f"--input-len-step-percentage is {step}; in a batch of {batch_size} with --input-len {input_len} "
                f"the shortest prompt would have {shortest} tokens, choose a smaller one"
            )


def _target(base_url: str, server_flags: Sequence[str]) -> Target:
    """The server that runs at `base_url`; flags about how a server is started are refused."""
    try:
        given = read_command_line(FLAGS, server_flags, usage="", description="", epilog="", version="")
    except FlagError as error:
        raise BenchmarkError(str(error)) from None
    for name in given:
        if name not in _WITH_BASE_URL:
            option = "--" + name.replace("_", "-")
            raise BenchmarkError(f"{option} is for a server that is started; --base-url {base_url} runs already")
    given.pop("model_path", None)
    return Target(base_url, **given)
