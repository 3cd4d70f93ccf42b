"""The work of `python -m sgl_jax.bench_one_batch_server`: batches of prompts, each sent as one streaming request.

docs/features/benchmarking.md defines the figures.
"""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sgl_jax.tools.benchmark.arguments import Case, cases
from sgl_jax.tools.benchmark.client import Client, ServerError, connect
from sgl_jax.tools.benchmark.datasets.source import IdSource
from sgl_jax.tools.benchmark.figures import markdown_table, report
from sgl_jax.tools.benchmark.machine_limits import BATCH_SHARES, Roofline, batch_shares, server_roofline
from sgl_jax.tools.benchmark.protocols import NATIVE, Outcome, Prompt, RequestOptions, request_body
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, append_jsonl, check_writable, say

TOOL = "bench_one_batch_server"
_WARM_UP = (16, 1024, 16)  # prompts of so many tokens, and tokens to generate, at most
_FIGURES = {  # titles and templates: a line of the block each, and a column of the report
    "batch size": "{batch_size}",
    "input_len": "{input_len}",
    "output_len": "{output_len}",
    "latency": "{latency:.3f} s",
    "ttft": "{ttft:.3f} s",
    "itl": "{itl_ms:.2f} ms",
    "input throughput": "{input_throughput:.2f} tok/s",
    "output throughput": "{output_throughput:.2f} tok/s",
    **BATCH_SHARES,
    "cached tokens": "{cached_tokens} of {input_tokens}",
    "accept length": "{accept_length:.2f}",
}


class BatchResult(NamedTuple):
    ttft_s: float
    latency_s: float
    cached_tokens: int | None  # tokens of the batch found in the server's prefix cache; None: the server does not tell
    accept_length: float | None = None  # tokens per step of a row with drafts; None: there are none


def main(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure the server that the flags name. Returns the exit code."""
    check_writable(args.result_filename, "--result-filename")
    return asyncio.run(run(args))


async def run(args: argparse.Namespace) -> int:
    """Measure every case, print it and append it to the file. Returns the exit code."""
    options = RequestOptions(temperature=args.temperature, return_logprob=args.return_logprob)
    async with connect(args) as client:
        info = await client.server_info()
        engine = info.get("engine") or {}
        if "vocab_size" not in engine:
            raise BenchmarkError("the server does not tell the size of its vocabulary; only ours can be measured")
        names = [info.get("model_path"), info.get("served_model_name")]
        if args.model_path not in (None, "None", *names):
            raise BenchmarkError(
                f"--model-path is {args.model_path}; the server that runs has {names[0]}: leave the flag out"
            )
        source = IdSource(engine["vocab_size"], None, np.random.default_rng(args.seed))
        roofline = server_roofline(args.machine_limits, engine)

        async def measure(case: Case) -> BatchResult:
            await client.flush_cache()  # without one: the prompts are new, so there is little to find
            return await run_case(client, case, [source.ids(case.input_len) for _ in range(case.batch_size)], options)

        if not args.skip_warmup:
            sizes = (max(args.batch_size), max(args.input_len), max(args.output_len))
            await measure(Case(*map(min, sizes, _WARM_UP)))
        settings = {name: getattr(args, name) for name in ("run_name", "temperature", "return_logprob", "seed")}
        settings["simulated_acceptance"] = bool(engine.get("simulated"))
        if settings["simulated_acceptance"]:
            say(TOOL, "the server's acceptance of drafts is SIMULATED (--speculative-simulated-acceptance)")
        records = []
        for case in cases(args):
            try:
                result = await measure(case)
            except BenchmarkError as error:
                say(TOOL, f"{case} failed: {error}")
                continue
            records.append(settings | record(case, result, roofline))
            print(report([f"{title}: {template}" for title, template in _FIGURES.items()], records[-1]), flush=True)
            append_jsonl(args.result_filename, records[-1])
            if args.profile:  # once more: what is measured runs without the profiler
                async with client.profile(args.profile_output_dir):
                    await measure(case)
    if args.show_report and records:
        print(markdown_table(_FIGURES, records))
    return SOME_FAILED if len(records) < len(cases(args)) else 0


def record(case: Case, result: BatchResult, roofline: Roofline | None) -> dict[str, Any]:
    """Return times in seconds, throughputs in tokens per second, shares 0 to 1; None where there is nothing to tell."""
    inputs, outputs = case.batch_size * case.input_len, case.batch_size * case.output_len
    decode_s = result.latency_s - result.ttft_s
    itl = decode_s / (case.output_len - 1) if case.output_len > 1 else None
    return vars(case) | {
        "input_tokens": inputs,
        "cached_tokens": result.cached_tokens,
        "accept_length": result.accept_length,
        "latency": result.latency_s,
        "ttft": result.ttft_s,
        "itl": itl,
        "itl_ms": itl and 1e3 * itl,
        "input_throughput": inputs / result.ttft_s,
        "output_throughput": outputs / decode_s if itl else None,
        "overall_throughput": (inputs + outputs) / result.latency_s,
        **batch_shares(roofline, case, itl, inputs - (result.cached_tokens or 0), result.ttft_s),
    }


async def run_case(client: Client, case: Case, prompts: Sequence[list[int]], options: RequestOptions) -> BatchResult:
    """Send the batch and follow its stream. Raises ServerError when the request fails, and BenchmarkError when a row does not get all its tokens."""
    batch: Any = prompts  # where other requests have one
    data = msgspec.json.encode(request_body(NATIVE, Prompt(batch, case.input_len, case.output_len), options))
    rows = [Outcome(case.input_len, 0.0) for _ in prompts]
    now = asyncio.get_running_loop().time
    start, ttft = now(), None
    async with aclosing(client.events(NATIVE.path, data)) as events:
        async for event in events:
            reading = rows[index := event.get("index", 0)]
            NATIVE.read(event, reading)
            if reading.aborted:
                raise ServerError(f"the server aborted row {index}: {reading.aborted}")
            if ttft is None and all(row.output_tokens for row in rows):
                ttft = now() - start
    latency = now() - start
    output, wanted = sum(row.output_tokens or 0 for row in rows), case.batch_size * case.output_len
    if ttft is None or output != wanted:
        raise BenchmarkError(f"the answer has {output} of {wanted} tokens")
    cached = [row.cached_tokens for row in rows if row.cached_tokens is not None]
    steps, accepted = sum(row.draft_steps for row in rows), sum(row.accepted_drafts for row in rows)
    return BatchResult(ttft, latency, sum(cached) if cached else None, 1 + accepted / steps if steps else None)
