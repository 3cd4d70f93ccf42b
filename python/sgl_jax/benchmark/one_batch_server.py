"""What `python -m sgl_jax.bench_one_batch_server` does with its flags: one batch after the other through a server."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.benchmark.client import NOT_OFFERED, Client, ServerError, connect, model_cost
from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.errors import SOME_FAILED, BenchmarkError, say
from sgl_jax.benchmark.markdown import Column, markdown_table
from sgl_jax.benchmark.one_batch import BatchOptions, BatchResult, run_case
from sgl_jax.benchmark.one_batch_arguments import Case, Target, cases, running_target
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost, limits_json, share_lines
from sgl_jax.benchmark.server_process import StartedServer, started_server
from sgl_jax.benchmark.serving_report import append_jsonl, check_writable

TOOL = "bench_one_batch_server"
_WARM_UP = Case(16, 1024, 16)  # at most
_COLUMNS = (
    Column("batch size", "batch_size"),
    Column("input len", "input_len"),
    Column("output len", "output_len"),
    Column("latency (s)", "latency", "{:.3f}"),
    Column("ttft (s)", "ttft", "{:.3f}"),
    Column("input throughput (tok/s)", "input_throughput", "{:.2f}"),
    Column("output throughput (tok/s)", "output_throughput", "{:.2f}"),
    Column("ITL (ms)", "itl", "{:.2f}", 1e3),
    Column("decode, of memory bandwidth", "decode_bandwidth_share", "{:.1%}"),
    Column("prefill, of matmul rate", "prefill_matmul_share", "{:.1%}"),
)


def measure_batches(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Against the server at --base-url, or one started from these flags. Returns the exit code."""
    if args.result_filename:
        check_writable(Path(args.result_filename), "--result-filename")
    if args.base_url:
        return asyncio.run(run(args, running_target(args.base_url, server_flags)))
    with started_server(server_flags, args.start_timeout) as server:
        return asyncio.run(run(args, Target(server.url, server.api_key), server))


async def run(args: argparse.Namespace, target: Target, started: StartedServer | None = None) -> int:
    """Measures every case, prints it and appends it to the file. Returns the exit code."""
    wanted = cases(args)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with connect(target.base_url, headers) as client:
        info = await client.server_info()
        source = _id_source(info, target.tokenizer_path, args.seed)
        model = None
        if args.api_type == "openai":
            model = target.served_model_name or await client.model_name()
        options = BatchOptions(args.api_type, model, args.temperature, args.return_logprob)
        if not args.skip_warmup:
            await _warm_up(client, wanted, source, options)
        limits = await _limits(client)
        cost = None if limits is None else model_cost(info)
        settings = {name: getattr(args, name) for name in ("run_name", "api_type", "temperature", "return_logprob")}
        settings |= {"seed": args.seed, "start_seconds": started and round(started.start_seconds, 3)}
        measured, records = [], []
        for case in wanted:
            try:
                result = await _measure(client, case, source, options)
            except BenchmarkError as error:
                if started:
                    started.check()
                say(TOOL, f"{case} failed: {error}")
                continue
            measured.append(case)
            records.append(settings | make_record(result, limits, cost))
            print(block(records[-1], limits), flush=True)
            if args.result_filename:
                append_jsonl(Path(args.result_filename), records[-1])
        if args.show_report and records:
            print(markdown_table(_COLUMNS, records))
        for case in measured if args.profile else ():  # once more: what is measured runs without the profiler
            await client.start_profile(args.profile_output_dir)
            try:
                await _measure(client, case, source, options)
            finally:
                await client.stop_profile()
    return 0 if len(records) == len(wanted) else SOME_FAILED


async def _warm_up(client: Client, wanted: Sequence[Case], source: IdSource, options: BatchOptions) -> None:
    """One request of the cases' greatest sizes, within bounds; not measured."""
    case = Case(
        min(_WARM_UP.batch_size, max(case.batch_size for case in wanted)),
        min(_WARM_UP.input_len, max(case.input_len for case in wanted)),
        min(_WARM_UP.output_len, max(case.output_len for case in wanted)),
    )
    try:
        await _measure(client, case, source, options)
    except BenchmarkError as error:  # so will the case of these sizes, and others may not
        say(TOOL, f"warming up with {case} failed: {error}")


async def _limits(client: Client) -> MachineLimits | None:
    try:
        return await client.measure_limits()
    except ServerError as error:
        say(TOOL, f"the machine's limits could not be measured: {error}")
        return None


async def _measure(client: Client, case: Case, source: IdSource, options: BatchOptions) -> BatchResult:
    try:
        await client.flush_cache()
    except ServerError as error:
        if error.status not in NOT_OFFERED:  # without it: the prompts are new, so there is little to find
            raise
    return await run_case(client, case, [source.ids(case.input_len) for _ in range(case.batch_size)], options)


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


def make_record(result: BatchResult, limits: MachineLimits | None, cost: ModelCost | None) -> dict[str, Any]:
    """Times in seconds, throughputs in tokens per second; None where there is nothing to tell."""
    found = {
        "batch_size": result.case.batch_size,
        "input_len": result.case.input_len,
        "output_len": result.case.output_len,
        "input_tokens": result.input_tokens,
        "cached_tokens": result.cached_tokens,
        "latency": result.latency_s,
        "ttft": result.ttft_s,
        "itl": result.itl_s,
        "input_throughput": result.input_throughput,
        "output_throughput": result.output_throughput,
        "overall_throughput": result.overall_throughput,
        "decode_bandwidth_share": cost and limits and result.decode_bandwidth_share(cost, limits),
        "prefill_matmul_share": cost and limits and result.prefill_matmul_share(cost, limits),
    }
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
    return rounded | limits_json(limits, cost)


def block(record: Mapping[str, Any], limits: MachineLimits | None) -> str:
    """The case for people, a figure a line."""
    lines = [
        f"batch size: {record['batch_size']}",
        f"input_len: {record['input_len']}",
        f"output_len: {record['output_len']}",
        f"latency: {record['latency']:.3f} s",
        f"ttft: {record['ttft']:.3f} s",
    ]
    if record["itl"] is not None:
        lines.append(f"itl: {record['itl'] * 1e3:.2f} ms")
    lines.append(f"input throughput: {record['input_throughput']:.2f} tok/s")
    if record["output_throughput"] is not None:
        lines.append(f"output throughput: {record['output_throughput']:.2f} tok/s")
    if limits is not None:
        lines += share_lines(limits, record["decode_bandwidth_share"], record["prefill_matmul_share"])
    if record["cached_tokens"]:
        lines.append(f"cached tokens: {record['cached_tokens']} of {record['input_tokens']}, not computed again")
    return "\n".join(lines) + "\n"
