"""The work of `python -m sgl_jax.bench_one_batch_server`: batches of prompts, each sent as one streaming
request.

    ttft               from sending until every row of the batch has its first token: the prefill of the whole batch
    latency            from sending to the end of the answer
    itl                (latency - ttft) / (output_len - 1)
    input throughput   prompt tokens / ttft
    output throughput  batch_size x output_len / (latency - ttft)

Nothing follows the first token when output_len is 1: itl and output throughput are None then.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.batch_arguments import Case, Target, cases, running_target
from sgl_jax.tools.benchmark.client import Client, ServerError, connect
from sgl_jax.tools.benchmark.datasets.source import IdSource
from sgl_jax.tools.benchmark.protocols import COMPLETIONS, NATIVE, Protocol, Reading, RequestOptions
from sgl_jax.tools.benchmark.records import Prompt
from sgl_jax.tools.benchmark.roofline import Roofline, batch_shares, server_roofline, share_lines
from sgl_jax.tools.benchmark.server_process import StartedServer, started_server
from sgl_jax.tools.benchmark.serving_report import append_jsonl, check_writable
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, Column, markdown_table, say

TOOL = "bench_one_batch_server"
_WARM_UP = (16, 1024, 16)  # prompts of so many tokens, and tokens to generate, at most
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
    check_writable(args.result_filename, "--result-filename")
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
        roofline = server_roofline(args.machine_limits, info.get("engine"))
        source = _id_source(info, target.tokenizer_path, args.seed)
        protocol, model = NATIVE, None
        if args.api_type == "openai":
            protocol, model = COMPLETIONS, target.served_model_name or await client.model_name()
        options = RequestOptions(model, args.temperature, return_logprob=args.return_logprob)

        async def measure(case: Case) -> BatchResult:
            await client.flush_cache()  # without one: the prompts are new, so there is little to find
            prompts = [source.ids(case.input_len) for _ in range(case.batch_size)]
            return await run_case(client, case, prompts, protocol, options)

        if not args.skip_warmup:
            sizes = (max(args.batch_size), max(args.input_len), max(args.output_len))
            case = Case(*map(min, sizes, _WARM_UP))
            try:
                await measure(case)
            except BenchmarkError as error:  # so will the case of these sizes, and others may not
                say(TOOL, f"warming up with {case} failed: {error}")
        settings = {name: getattr(args, name) for name in ("run_name", "api_type", "temperature", "return_logprob")}
        settings |= {"seed": args.seed, "start_seconds": started and round(started.start_seconds, 3)}
        measured, records = [], []
        for case in wanted:
            try:
                result = await measure(case)
            except BenchmarkError as error:
                if started:
                    started.check()
                say(TOOL, f"{case} failed: {error}")
                continue
            measured.append(case)
            records.append(settings | result.record(roofline))
            print(block(records[-1]), flush=True)
            append_jsonl(args.result_filename, records[-1])
        if args.show_report and records:
            print(markdown_table(_COLUMNS, records))
        for case in measured if args.profile else ():  # once more: what is measured runs without the profiler
            await client.start_profile(args.profile_output_dir)
            try:
                await measure(case)
            finally:
                await client.stop_profile()
    return 0 if len(records) == len(wanted) else SOME_FAILED


def _id_source(info: Mapping[str, Any], tokenizer_path: str | None, seed: int) -> IdSource:
    try:
        tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    except TokenizerError as error:
        raise BenchmarkError(f"--tokenizer-path: {error}") from error
    vocab_size = (info.get("engine") or {}).get("vocab_size")
    if vocab_size is None and tokenizer is None:
        raise BenchmarkError("the server does not tell the size of its vocabulary; give --tokenizer-path")
    return IdSource(vocab_size, tokenizer, np.random.default_rng(seed))


# --- one batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchResult:
    """Formulas at the top of this file."""

    case: Case
    input_tokens: int  # of the whole batch
    cached_tokens: int | None  # of them, found in the server's prefix cache; None: the server does not tell
    ttft_s: float
    latency_s: float

    def record(self, roofline: Roofline | None) -> dict[str, Any]:
        """Times in seconds, throughputs in tokens per second, of the machine 0 to 1; None where there is nothing to tell.

        A row's context is its prompt and half of its output; cached tokens are not computed.
        """
        rows, output_len = self.case.batch_size, self.case.output_len
        decode_s = self.latency_s - self.ttft_s
        itl = decode_s / (output_len - 1) if output_len > 1 else None
        context = self.input_tokens / rows + output_len / 2
        computed = self.input_tokens - (self.cached_tokens or 0)
        found = vars(self.case) | {
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "latency": self.latency_s,
            "ttft": self.ttft_s,
            "itl": itl,
            "input_throughput": self.input_tokens / self.ttft_s,
            "output_throughput": rows * output_len / decode_s if output_len > 1 and decode_s > 0 else None,
            "overall_throughput": (self.input_tokens + rows * output_len) / self.latency_s,
            **batch_shares(roofline, rows, context, itl, computed, self.ttft_s),
        }
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}


def block(record: Mapping[str, Any]) -> str:
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
    lines += share_lines(record)
    if record["cached_tokens"]:
        lines.append(f"cached tokens: {record['cached_tokens']} of {record['input_tokens']}, not computed again")
    return "\n".join(lines) + "\n"


async def run_case(
    client: Client, case: Case, prompts: Sequence[list[int]], protocol: Protocol, options: RequestOptions
) -> BatchResult:
    """Raises ServerError when the request fails, and BenchmarkError when a row does not get all its tokens."""
    batch: Any = prompts  # where other requests have one
    body = protocol.body(Prompt(batch, case.input_len, case.output_len), options, None)
    data = msgspec.json.encode(body)  # before the clock runs
    rows = _Rows(protocol, case.batch_size)
    now = asyncio.get_running_loop().time
    start, ttft = now(), None
    try:
        async with aclosing(client.events(protocol.path, data)) as events:
            async for event in events:
                rows.read(event)
                if ttft is None and not rows.waiting:
                    ttft = now() - start
    except (AttributeError, LookupError, TypeError) as error:
        raise ServerError(f"the answer is not one of {protocol.path}: {type(error).__name__}: {error}") from error
    latency = now() - start
    output, cached = rows.totals()
    wanted = case.batch_size * case.output_len
    if ttft is None or output not in (None, wanted):
        raise BenchmarkError(f"the answer has {output or 0} of {wanted} tokens")
    return BatchResult(case, sum(map(len, prompts)), cached, ttft, latency)


class _Rows:
    """Counts of what a stream has said of each row, and of the batch: /generate counts a row's tokens, /v1/completions all rows'.

    With /v1/completions a row's first token is its first text. A token without text, a part of a character, shows with
    the next one.
    """

    def __init__(self, protocol: Protocol, batch_size: int):
        self.waiting = set(range(batch_size))  # for their first token
        self._protocol = protocol
        self._rows = [Reading() for _ in range(batch_size)]
        self._batch = Reading()

    def read(self, event: dict[str, Any]) -> None:
        if self._protocol is NATIVE:
            parts = {event.get("index", 0): event}
        else:
            parts = {choice["index"]: {"choices": [choice]} for choice in event.get("choices") or ()}
            self._protocol.read(event | {"choices": []}, self._batch)
        for row, part in parts.items():
            reading = self._rows[row]
            self._protocol.read(part, reading)
            if reading.aborted:
                raise ServerError(f"the server aborted row {row}: {reading.aborted}")
            ended = "choices" in part and part["choices"][0].get("finish_reason")
            if reading.output_tokens or reading.text or ended:
                self.waiting.discard(row)

    def totals(self) -> tuple[int | None, int | None]:
        """(output tokens, cached tokens) of the batch; None: not told."""
        if self._protocol is not NATIVE:
            return self._batch.output_tokens, self._batch.cached_tokens
        cached = [reading.cached_tokens for reading in self._rows if reading.cached_tokens is not None]
        return sum(reading.output_tokens or 0 for reading in self._rows), sum(cached) if cached else None
