"""The work of `python -m sgl_jax.bench_offline_throughput`: a data set worked off by an engine, all of it given at once.

Decode steps are the engine's own count; docs/features/benchmarking.md defines the figures.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from sgl_jax.engine.engine import Engine
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.engine.messages import Stats
from sgl_jax.request import InvalidParameter
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.hub import HubError
from sgl_jax.settings.speculators import with_verifier
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.arguments import engine_options, server_arguments
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.figures import labelled, throughputs
from sgl_jax.tools.benchmark.machine_limits import measured_roofline, shares_block
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, append_jsonl, block, check_writable, start_log

TOOL = "bench_offline_throughput"
_STATS_TIMEOUT_S = 5.0
_FEW, _WARM_UP_OUTPUT = 16, 16  # prompts of the warm-up and of the trace, and tokens of its answers, at most


def main(args: argparse.Namespace, server_flags: Sequence[str]) -> int:
    """Read the data, start an engine and run. Returns the exit code; raises BenchmarkError."""
    server_args = server_arguments(server_flags)
    start_log(server_args)
    check_writable(args.result_filename, "--result-filename")
    if (n := args.extra_request_body.get("n", 1)) != 1:
        raise BenchmarkError(f"--extra-request-body has n {n}; one answer to a prompt is measured")
    try:
        path = server_args.tokenizer_path or with_verifier(server_args).model_path
        tokenizer = load_tokenizer(path, server_args.chat_template, server_args.downloads)
        prompts = load_prompts(args, tokenizer, None, args.seed)  # before the model: a mistake should be said at once
        with Engine(**engine_options(server_args)) as engine:
            return run(args, engine, prompts)
    except (TokenizerError, EngineFailed, FlagError, HubError) as error:
        raise BenchmarkError(str(error)) from error


def run(
    args: argparse.Namespace, engine: Engine, prompts: Sequence[Prompt], clock: Callable[[], float] = time.perf_counter
) -> int:
    """Do everything after the start. Returns the exit code.

    `clock`, in seconds, is read before the prompts are given and after the last answer.
    """
    sampling = {"temperature": 0.0, "ignore_eos": not args.disable_ignore_eos, **args.extra_request_body}
    if not args.skip_warmup:
        short = [replace(each, output_len=min(each.output_len, _WARM_UP_OUTPUT)) for each in prompts[:_FEW]]
        generated = engine.stats.generated_tokens
        generated += sum(answer["meta_info"]["completion_tokens"] for answer in generate(engine, short, sampling))
        settled(engine, generated)
        while engine.stats.num_compiling:  # beside the warm-up; a larger program stood in
            time.sleep(0.1)
        engine.flush_cache()
    roofline = measured_roofline(TOOL, engine.info)
    before, start = engine.stats, clock()
    answers = generate(engine, prompts, sampling)
    duration = clock() - start
    metas = [answer["meta_info"] for answer in answers if answer["meta_info"]["finish_reason"]["type"] != "abort"]
    inputs, outputs, cached = (sum(m[f"{which}_tokens"] for m in metas) for which in ("prompt", "completion", "cached"))
    after = settled(engine, before.generated_tokens + outputs)
    steps = after.steps - before.steps
    found = {
        "successful_requests": len(metas),
        "total_latency": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": cached,
        "steps": steps,
        "last_gen_throughput": after.gen_throughput or None,  # over a log interval, which the run may not reach
        **throughputs(len(metas), inputs, outputs, duration),
    }
    if (drafts := after.drafts.since(before.drafts)).steps:
        found["accept_length"] = drafts.accept_length
    if engine.info.simulated:
        found["simulated_acceptance"] = True
    print("\n" + block("Offline Throughput Benchmark Result", {"Backend": args.backend} | labelled(found)))
    shares = {}
    if roofline is not None and outputs:
        # summed over output tokens: its prompt and half of its answer
        context = sum(m["completion_tokens"] * (m["prompt_tokens"] + m["completion_tokens"] / 2) for m in metas)
        computed = inputs - cached + outputs
        shares = roofline.shares(outputs / steps, context / outputs, duration / steps, computed, duration)
        print("\n" + shares_block(shares))
    settings = {name: getattr(args, name) for name in ("backend", "dataset_name", "seed")}
    settings |= {"model_path": engine.info.model_path, "dtype": engine.info.dtype, "num_prompts": len(prompts)}
    append_jsonl(args.result_filename, settings | {"sampling_params": sampling} | found | shares)
    if args.profile:
        engine.flush_cache()
        with jax.profiler.trace(folder := args.profile_output_dir or "profile_offline"):
            generate(engine, prompts[:_FEW], sampling)
        print(f"\nTrace: {folder}")
    return SOME_FAILED if len(metas) < len(prompts) else 0


def generate(engine: Engine, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """Generate all answers: texts are encoded here, within what is timed. Raises BenchmarkError for what is refused."""
    params = [{"max_new_tokens": each.output_len, **sampling} for each in prompts]
    ids = [engine.tokenizer.encode(p) if isinstance(p := each.prompt, str) else p for each in prompts]
    try:
        answers: Any = engine.generate(input_ids=ids, sampling_params=params)  # a list, as the prompts are one
    except InvalidParameter as error:
        raise BenchmarkError(f"a request is refused: {error}") from error
    return answers


def settled(engine: Engine, wanted: int) -> Stats:
    """Return the engine's totals once they count so many generated tokens: they come a moment after the answers."""
    deadline = time.monotonic() + _STATS_TIMEOUT_S
    while (stats := engine.stats).generated_tokens < wanted or stats.num_running:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the engine counts {stats.generated_tokens} generated tokens, its answers {wanted}")
        time.sleep(0.001)
    return stats
