"""The work of `python -m sgl_jax.bench_one_batch`: batches in the engine's own loop, every step waited for.

docs/features/benchmarking.md defines the figures.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from sgl_jax.engine.core import Core
from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.engine.loop import one_line
from sgl_jax.engine.messages import Abort, EngineInfo, Generate, StepOutput
from sgl_jax.engine.startup import build_core
from sgl_jax.request import SamplingParams
from sgl_jax.tools.benchmark.arguments import Case, alone_arguments, cases
from sgl_jax.tools.benchmark.datasets.source import IdSource
from sgl_jax.tools.benchmark.figures import report
from sgl_jax.tools.benchmark.machine_limits import BATCH_SHARES, Roofline, batch_shares, measured_roofline
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, append_jsonl, check_writable, say, start_log

TOOL = "bench_one_batch"
_DECODE_LINES = 5  # steps printed one by one
_WARM_UP_TOKENS = 4


def main(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Start the engine in this process and run. Returns the exit code; raises BenchmarkError."""
    server_args = alone_arguments(server_flags)
    start_log(server_args, ("disable_radix_cache", "disable_overlap_schedule", "max_queued_requests"))
    check_writable(args.result_filename, "--result-filename")
    try:
        core = build_core(replace(server_args, **ALONE), partial(check_fit, cases(args)))
    except (ValueError, OSError) as error:  # mistakes of the user
        raise BenchmarkError(one_line(error)) from error
    return run(args, core)


def run(args: argparse.Namespace, core: Core, clock: Callable[[], float] = time.perf_counter) -> int:
    """Do everything after the start. Returns the exit code."""
    source = IdSource(core.info.vocab_size, None, np.random.default_rng(args.seed))

    def timed(case: Case) -> tuple[float, list[float]]:
        return time_batch(core, [source.ids(case.input_len) for _ in range(case.batch_size)], case.output_len, clock)

    roofline = measured_roofline(TOOL, core.info)
    before = core.runner.compiles_after_ready  # measuring compiles too
    for case in cases(args):
        timed(replace(case, output_len=min(case.output_len, _WARM_UP_TOKENS)))
        prefill_s, decode_s = timed(case)
        found = {"run_name": args.run_name, "compiles_after_ready": core.runner.compiles_after_ready - before}
        found |= record(case, prefill_s, decode_s, core.info, roofline)
        print(block_of(found, decode_s), flush=True)
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


# Flags with which a step is waited for before the next is planned, and no prompt of an earlier batch is found again.
ALONE = {"disable_overlap_schedule": True, "disable_radix_cache": True}


def time_batch(
    core: Core, prompts: Sequence[list[int]], output_len: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[float]]:
    """Run greedy requests together, in a core with the flags ALONE, until there are output_len - 1 decode steps.

    Returns the seconds of the prefill and of each decode step. Rows whose prompts are complete decode beside the others'
    prefill, as in a server; those steps count as prefill. `clock` in seconds is read at the start and after each step.
    Raises BenchmarkError when a row ends too early.
    """
    # A row decodes in at most as many steps as all prompts take, in chunks that leave room for the rows that decode.
    chunk, longest = core.info.chunked_prefill_size, len(prompts[0])
    max_tokens = output_len + math.ceil(sum(longest / max(chunk - row, 1) for row in range(len(prompts))))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = last = clock()
    for key, prompt in enumerate(prompts):
        core.handle(Generate(key, prompt, params))
    waiting = set(range(len(prompts)))
    prefill_s, decode_s = None, []
    while prefill_s is None or len(decode_s) < output_len - 1:
        outputs = [event for event in core.step() if isinstance(event, StepOutput)]
        now = clock()
        if any(output.finished for output in outputs):
            flags = "--max-total-tokens, --context-length or --chunked-prefill-size"
            raise BenchmarkError(f"the batch did not run at once: raise {flags}")
        waiting.difference_update(*(output.keys for output in outputs))
        if prefill_s is None and not waiting:
            prefill_s = now - start
        elif prefill_s is not None:
            decode_s.append(now - last)
        last = now
    core.handle(Abort(list(range(len(prompts)))))
    while core.busy:
        core.step()
    return prefill_s, decode_s


def check_fit(batches: Sequence[Case], plan: LaunchPlan) -> None:
    """Check that each batch can run at once. Raises BenchmarkError with the limit that is in the way."""
    for case in batches:
        tokens = case.input_len + case.output_len
        for needed, limit, of, flag in (
            (case.batch_size, plan.runner_config.num_rows, "requests at once", "--max-running-requests"),
            (tokens, plan.runner_config.context_length, "tokens of a request", "--context-length"),
            (case.batch_size * tokens, plan.kv_tokens, "tokens", "--max-total-tokens or --mem-fraction-static"),
        ):
            if needed > limit:
                raise BenchmarkError(f"{case}: it needs {needed} {of}, and {limit} are possible; raise {flag}")


def record(
    case: Case, prefill_s: float, decode_s: Sequence[float], info: EngineInfo, roofline: Roofline | None
) -> dict[str, Any]:
    """Return the line of JSON: seconds, tokens per second, shares 0 to 1; None where there is no decode step."""
    rows, inputs = case.batch_size, case.batch_size * case.input_len
    median, total = float(np.median(decode_s)) if decode_s else None, prefill_s + sum(decode_s)
    return vars(case) | {
        "prefill_latency": prefill_s,
        "prefill_throughput": inputs / prefill_s,
        "median_decode_latency": median,
        "median_decode_throughput": rows / median if median else None,
        "total_latency": total,
        "overall_throughput": rows * (case.input_len + case.output_len) / total,
        **{name: getattr(info, name) for name in ("model_path", "dtype", "device_kind", "num_devices")},
        **batch_shares(roofline, case, median, inputs, prefill_s),
    }


def block_of(found: Mapping[str, Any], decode_s: Sequence[float]) -> str:
    """Format the batch. Labels are those that existing scripts look for."""
    rows = found["batch_size"]
    steps = [
        f"Decode {i}. Batch size: {rows}, latency: {seconds:6.5f} s, throughput: {rows / seconds:9.2f} token/s"
        for i, seconds in enumerate(decode_s[:_DECODE_LINES])
    ]
    lines = [
        "Batch size: {batch_size}, input length: {input_len}, output length: {output_len}",
        "Prefill. latency: {prefill_latency:6.5f} s, throughput: {prefill_throughput:9.2f} token/s",
        *steps,
        "Decode. median latency: {median_decode_latency:6.5f} s, "
        "median throughput: {median_decode_throughput:9.2f} token/s",
        "Total. latency: {total_latency:6.3f} s, throughput: {overall_throughput:9.2f} token/s",
        *(f"{title.capitalize()}: {template}" for title, template in BATCH_SHARES.items()),
    ]
    return report(lines, found)
