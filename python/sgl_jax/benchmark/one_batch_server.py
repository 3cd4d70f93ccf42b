"""What `python -m sgl_jax.bench_one_batch_server` does with its flags: one batch after the other through a server."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.benchmark.client import Client, ServerError, connect, model_cost
from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.one_batch import BatchOptions, BatchResult, run_case
from sgl_jax.benchmark.one_batch_arguments import Case, Target, cases, running_target
from sgl_jax.benchmark.one_batch_report import block, make_record, report
from sgl_jax.benchmark.roofline import MachineLimits
from sgl_jax.benchmark.server_process import StartedServer, started_server
from sgl_jax.benchmark.serving_report import append_jsonl

CASE_FAILED, BAD_USE, INTERRUPTED = 1, 2, 130  # exit codes
_READY_TIMEOUT_S = 60.0
_WARM_UP = Case(16, 1024, 16)  # at most


def measure_batches(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Against the server at --base-url, or one started from these flags. Returns the exit code."""
    try:
        if args.base_url:
            return asyncio.run(run(args, running_target(args.base_url, server_flags)))
        with started_server(server_flags, args.start_timeout) as server:
            return asyncio.run(run(args, Target(server.url, server.api_key), server))
    except BenchmarkError as error:
        _say(f"error: {error}")
        return BAD_USE
    except KeyboardInterrupt:
        return INTERRUPTED


async def run(args: argparse.Namespace, target: Target, started: StartedServer | None = None) -> int:
    """Measures every case, prints it and appends it to the file. Returns the exit code."""
    wanted = cases(args)
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
            await _warm_up(client, wanted, source, options)
        limits = await _limits(client)
        cost = None if limits is None else model_cost(info)
        start_seconds = None if started is None else started.start_seconds
        measured, records = [], []
        for case in wanted:
            try:
                result = await _measure(client, case, source, options)
            except BenchmarkError as error:
                if started:
                    started.check()
                _say(f"{case} failed: {error}")
                continue
            throughput = _last_gen_throughput(await client.server_info())
            measured.append(case)
            records.append(make_record(vars(args), result, throughput, limits, cost, start_seconds))
            print(block(records[-1]), flush=True)
            if args.result_filename:
                append_jsonl(Path(args.result_filename), records[-1])
        if args.show_report and records:
            print(report(records))
        if args.profile:
            await _profile(client, measured, source, options, args.profile_output_dir)
    return 0 if len(records) == len(wanted) else CASE_FAILED


async def _warm_up(client: Client, wanted: Sequence[Case], source: IdSource, options: BatchOptions) -> None:
    """One request of the cases' greatest sizes, within bounds; not measured."""
    case = Case(
        min(_WARM_UP.batch_size, max(case.batch_size for case in wanted)),
        min(_WARM_UP.input_len, max(case.input_len for case in wanted)),
        min(_WARM_UP.output_len, max(case.output_len for case in wanted)),
    )
    try:
        await _measure(client, case, source, options)
    except BenchmarkError as error:
        _say(f"warming up with {case} failed: {error}")  # so will the case of these sizes, and others may not


async def _limits(client: Client) -> MachineLimits | None:
    try:
        return await client.measure_limits()
    except ServerError as error:
        _say(f"the machine's limits could not be measured: {error}")
        return None


async def _measure(client: Client, case: Case, source: IdSource, options: BatchOptions) -> BatchResult:
    try:
        await client.flush_cache()
    except ServerError as error:
        if error.status not in (404, 405, 501):  # without it: the prompts are new, so there is little to find
            raise
    return await run_case(client, case, [source.ids(length) for length in case.input_lens()], options)


async def _profile(
    client: Client, measured: Sequence[Case], source: IdSource, options: BatchOptions, output_dir: str | None
) -> None:
    """The cases once more, each in a trace of its own: what is measured runs without the profiler."""
    for case in measured:
        await client.start_profile(output_dir)
        try:
            await _measure(client, case, source, options)
        finally:
            await client.stop_profile()


def _say(line: str) -> None:
    print(f"bench_one_batch_server: {line}", file=sys.stderr, flush=True)


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
    """As the server logged it last; None where it does not tell, or has not logged any."""
    states = info.get("internal_states") or [{}]
    return states[0].get("last_gen_throughput") or None
