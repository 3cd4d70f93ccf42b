"""The work of `python -m sgl_jax.bench_one_batch`: batches driven on the device itself, with
no scheduler and no prefix cache, every step waited for.

prefill throughput  prompt tokens / time until every row's first token is on the host
decode latency      of one step, from the tokens before to its own tokens on the host
decode throughput   rows / decode latency
total throughput    prompt and output tokens / (prefill + all decode steps)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from sgl_jax.engine.core import Core, Runner
from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.engine.loop import one_line
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.engine.startup import build_core
from sgl_jax.request import Request, SamplingParams
from sgl_jax.scheduler.rows import encode_params
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.step_plan import StepPlan
from sgl_jax.tools.benchmark.batch_arguments import Case, cases, start_log
from sgl_jax.tools.benchmark.datasets.source import IdSource
from sgl_jax.tools.benchmark.machine_limits import limits_of
from sgl_jax.tools.benchmark.roofline import MachineLimits, ModelCost, Roofline, batch_shares, share_lines
from sgl_jax.tools.benchmark.serving_report import append_jsonl, check_writable
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, say

TOOL = "bench_one_batch"
_DECODE_LINES = 5  # steps printed one by one
_WARM_UP_TOKENS = 4
_NO_SCHEDULER = (  # flags that are about one
    "disable_radix_cache",
    "schedule_policy",
    "dp_schedule_policy",
    "max_queued_requests",
    "disable_overlap_schedule",
    "decode_log_interval",
)


def measure_batches(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Starts the engine's device side and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args, _NO_SCHEDULER)
    if server_args.dp_size > 1:
        raise BenchmarkError(
            f"--dp-size is {server_args.dp_size}; this tool runs one batch on one rank, leave it out "
            "(bench_offline_throughput measures several)"
        )
    check_writable(args.result_filename, "--result-filename")

    def accept(plan: LaunchPlan) -> None:
        for case in cases(args):
            check_fits(case, plan)

    try:
        core = build_core(server_args, accept)
    except (ValueError, OSError) as error:  # those are for the user to mend
        raise BenchmarkError(one_line(error)) from error
    return run(args, core)


def run(
    args: argparse.Namespace,
    core: Core,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[EngineInfo], MachineLimits] = limits_of,
) -> int:
    """Everything after the start. Returns the exit code."""
    source = IdSource(core.info.vocab_size, None, np.random.default_rng(args.seed))

    def timed(case: Case) -> BatchTimes:
        prompts = [source.ids(case.input_len) for _ in range(case.batch_size)]
        return time_batch(DeviceBatch(core.runner, core.info, prompts, case.output_len), case, clock)

    roofline = _measured_roofline(core.info, measure)
    before = core.runner.compiles_after_ready  # measuring compiles too
    for case in cases(args):
        timed(replace(case, output_len=min(case.output_len, _WARM_UP_TOKENS)))
        times = timed(case)
        found = {"run_name": args.run_name} | record(
            times, core.runner.compiles_after_ready - before, core.info, roofline
        )
        print(block(found, times), flush=True)
        append_jsonl(args.result_filename, found)
        if args.profile:
            size = f"batch{case.batch_size}_input{case.input_len}_output{case.output_len}"
            with jax.profiler.trace(folder := f"{args.profile_filename_prefix or 'profile'}_{size}"):
                timed(case)
            print(f"Trace: {folder}\n", flush=True)
    if compiles := core.runner.compiles_after_ready - before:
        say(TOOL, f"{compiles} programs were compiled while it was timed")
        return SOME_FAILED
    return 0


def _measured_roofline(info: EngineInfo, measure: Callable[[EngineInfo], MachineLimits]) -> Roofline | None:
    """None, said on standard error, where the limits cannot be measured."""
    try:
        return Roofline(measure(info), ModelCost.of(info))
    except ValueError as error:
        say(TOOL, str(error))
        return None


def record(times: BatchTimes, compiles: int, info: EngineInfo, roofline: Roofline | None) -> dict[str, Any]:
    """The line of JSON: seconds, tokens per second; None where there is no decode step. Shares of the machine, 0 to 1, are
    of the median step with the KV of the mean one: the prompt and half of the output."""
    rows, input_len, output_len = times.case.batch_size, times.case.input_len, times.case.output_len
    median, total = times.median_decode_s, times.prefill_s + sum(times.decode_s)
    context = input_len + output_len / 2
    return vars(times.case) | {
        "prefill_latency": times.prefill_s,
        "prefill_throughput": rows * input_len / times.prefill_s,
        "median_decode_latency": median,
        "median_decode_throughput": rows / median if median else None,
        "total_latency": total,
        "overall_throughput": rows * (input_len + output_len) / total,
        "compiles_after_ready": compiles,
        "model_path": info.model_path,
        "dtype": info.dtype,
        "device_kind": info.device_kind,
        "num_devices": info.num_devices,
        **batch_shares(roofline, rows, context, median, rows * input_len, times.prefill_s),
    }


def block(found: Mapping[str, Any], times: BatchTimes) -> str:
    """The batch for people. Labels are those that existing scripts look for."""

    def figures(seconds: float, throughput: float, name: str = "") -> str:
        return f"{name}latency: {seconds:6.5f} s, {name}throughput: {throughput:9.2f} token/s"

    rows = times.case.batch_size
    lines = [
        f"Batch size: {rows}, input length: {times.case.input_len}, output length: {times.case.output_len}",
        f"Prefill. {figures(times.prefill_s, found['prefill_throughput'])}",
    ]
    for i, seconds in enumerate(times.decode_s[:_DECODE_LINES]):
        lines.append(f"Decode {i}. Batch size: {rows}, {figures(seconds, rows / seconds)}")
    if (median := times.median_decode_s) is not None:
        lines.append(f"Decode. {figures(median, found['median_decode_throughput'], 'median ')}")
    total = f"latency: {found['total_latency']:6.3f} s, throughput: {found['overall_throughput']:9.2f} token/s"
    lines += [f"Total. {total}", *(line[0].upper() + line[1:] for line in share_lines(found))]
    return "\n".join(lines) + "\n"


# --- a batch on the device ----------------------------------------------------------------------------------------------


def check_fits(case: Case, plan: LaunchPlan) -> None:
    """Raises BenchmarkError with the limit that is in the way: the batch must run at once."""
    limits = plan.runner_config
    if case.batch_size > limits.num_rows:
        raise BenchmarkError(
            f"--batch-size is {case.batch_size}; {limits.num_rows} requests can run at once, "
            "raise --max-running-requests"
        )
    tokens = case.input_len + case.output_len
    if tokens > limits.context_length:
        raise BenchmarkError(
            f"--input-len {case.input_len} and --output-len {case.output_len} make {tokens} tokens; a request may "
            f"hold {limits.context_length}, raise --context-length if the model allows it"
        )
    pool = plan.kv_tokens // limits.page_size
    if (pages := case.batch_size * _pages(tokens, limits.page_size)) > pool:
        raise BenchmarkError(
            f"{case.batch_size} requests of {tokens} tokens need {pages} pages of {limits.page_size} tokens; the KV "
            f"pool has {pool}, raise --max-total-tokens or --mem-fraction-static"
        )


@dataclass(frozen=True)
class BatchTimes:
    """Seconds."""

    case: Case
    prefill_s: float
    decode_s: list[float]  # each step

    @property
    def median_decode_s(self) -> float | None:
        """None where there is no decode step."""
        return float(np.median(self.decode_s)) if self.decode_s else None


class DeviceBatch:
    """Greedy requests in rows of their own, computed together.

    Row r owns the pages [1 + r x n, 1 + (r + 1) x n), n being what the longest row needs; page 0 is the scratch page.
    """

    def __init__(self, runner: Runner, info: EngineInfo, prompts: Sequence[Sequence[int]], output_len: int):
        self._runner = runner
        self._page_size, self._chunk = info.page_size, info.chunked_prefill_size
        self._prompts = [np.array(prompt, np.int32) for prompt in prompts]
        self._prompt_len = np.array([len(prompt) for prompt in prompts], np.int32)
        self._computed = np.zeros(len(prompts), np.int32)
        self._pages_per_row = _pages(int(self._prompt_len.max()) + output_len, info.page_size)
        longest = len(prompts[0]) + output_len
        params, no_stops = SamplingParams(temperature=0.0, ignore_eos=True), np.empty(0, np.int32)
        greedy = Request(
            key=0, prompt=self._prompts[0], params=params, namespace="", seed=0, max_total_tokens=longest,
            stop_token_ids=no_stops, arrival=0,
        )  # fmt: skip
        self._params = encode_params(greedy)

    def prefill(self) -> None:
        """Compute the prompts; returns when the last step's tokens are here."""
        flights = [self._runner.launch(plan) for plan in self._prefill_plans()]
        for flight in flights:
            flight.collect()

    def decode(self) -> None:
        """One more token for every row."""
        rows = np.arange(len(self._prompts), dtype=np.int32)
        unknown = np.zeros_like(rows)  # the device has the tokens
        plan = self._plan(rows, np.ones_like(rows), unknown, np.full_like(rows, -1))
        self._runner.launch(plan).collect()

    def _prefill_plans(self) -> Iterator[StepPlan]:
        """Steps of as many prompt tokens as the engine takes, row after row."""
        while (missing := self._prompt_len - self._computed).any():
            before = np.cumsum(missing) - missing
            num_new = np.clip(self._chunk - before, 0, missing)
            rows = np.flatnonzero(num_new).astype(np.int32)
            rows = rows[np.argsort(num_new[rows] > 1, kind="stable")]  # single tokens first
            start, end = self._computed[rows], self._computed[rows] + num_new[rows]
            prompts = [self._prompts[row] for row in rows]
            tokens = np.concatenate([p[s:e] for p, s, e in zip(prompts, start, end, strict=True)])
            follows = [p[e] if e < len(p) else -1 for p, e in zip(prompts, end, strict=True)]
            yield self._plan(rows, num_new[rows].astype(np.int32), tokens, np.array(follows, np.int32))

    def _plan(self, rows: np.ndarray, num_new: np.ndarray, tokens: np.ndarray, next_token: np.ndarray) -> StepPlan:
        """The next tokens of these rows, which then count as computed."""
        start = self._computed[rows]
        end = self._computed[rows] = start + num_new
        return StepPlan.of(
            num_new,
            keys=rows.astype(np.int64),
            rows=rows,
            start=start,
            samples=end >= self._prompt_len[rows],
            from_device=start >= self._prompt_len[rows],
            next_token=next_token,
            tokens=tokens,
            params=np.tile(self._params, (len(rows), 1)),
            page_updates=self._page_updates(rows, _pages(start, self._page_size), _pages(end, self._page_size)),
        )

    def _page_updates(self, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Each row's pages number first to last: i32[3, U] (row, index, page)."""
        need = last - first
        row = np.repeat(rows, need)
        index = np.repeat(first - (np.cumsum(need) - need), need) + np.arange(len(row))
        return np.stack([row, index, 1 + row * self._pages_per_row + index]).astype(np.int32)


def time_batch(batch: DeviceBatch, case: Case, clock: Callable[[], float]) -> BatchTimes:
    """`clock` in seconds is read at the start, when the prefill's tokens have come, and after each decode step."""
    before = clock()
    batch.prefill()
    now = clock()
    prefill, decode = now - before, []
    for _ in range(case.output_len - 1):
        before = now
        batch.decode()
        now = clock()
        decode.append(now - before)
    return BatchTimes(case, prefill, decode)


def _pages[T: (int, np.ndarray)](tokens: T, page_size: int) -> T:
    return -(-tokens // page_size)
