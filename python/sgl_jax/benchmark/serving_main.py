"""What `python -m sgl_jax.bench_serving` does with its flags, from asking the server who it is to the exit code."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_jax.benchmark import datasets
from sgl_jax.benchmark.arguments import base_url, headers
from sgl_jax.benchmark.client import allow_many_connections, connect
from sgl_jax.benchmark.errors import INTERRUPTED, SOME_FAILED, BenchmarkError, say
from sgl_jax.benchmark.figures import ServingRun
from sgl_jax.benchmark.protocols import BACKENDS, NATIVE, RequestOptions
from sgl_jax.benchmark.serving import ServingConfig, run_serving
from sgl_jax.benchmark.serving_report import (
    append_jsonl,
    check_writable,
    failure_line,
    roofline_block,
    run_json,
    standard_block,
)
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

TOOL = "bench_serving"


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself. None: it does not."""

    model: str | None
    tokenizer_path: str | None
    vocab_size: int | None


def serve_load(args: argparse.Namespace) -> int:
    """Runs what the flags say and prints the result. Returns the exit code; raises BenchmarkError."""
    if args.plot is not None:
        from sgl_jax.benchmark.plot import check_plot

        check_plot(args.plot)  # what is missing is said before the run, not after it
    if args.output_file is not None:
        check_writable(args.output_file)
    allow_many_connections()
    facts = asyncio.run(ask_server(args))
    tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
    prompts = datasets.load_prompts(args, tokenizer, facts.vocab_size, args.seed)
    run = asyncio.run(run_serving(serving_config(args, facts), prompts, tokenizer, data_settings(args)))
    report(run, args)
    if run.interrupted:
        return INTERRUPTED
    return SOME_FAILED if run.figures.failed else 0


async def ask_server(args: argparse.Namespace) -> ServerFacts:
    """Raises BenchmarkError when the server does not answer, or --model is needed and it names none."""
    async with connect(base_url(args), headers(args)) as client:
        if args.ready_check_timeout_sec:
            await client.wait_until_ready(args.ready_check_timeout_sec)
        info = await client.server_info()
        model = args.served_model_name or args.model or await client.model_name()
    if model is None and BACKENDS[args.backend].protocol is not NATIVE:
        raise BenchmarkError(f"the server at {base_url(args)} names no model in /v1/models; give --model")
    engine = info.get("engine")
    vocab_size = engine.get("vocab_size") if isinstance(engine, dict) else None
    return ServerFacts(model, info.get("tokenizer_path"), vocab_size)


def find_tokenizer(given: str | None, model: str | None, facts: ServerFacts) -> Tokenizer | None:
    """The one that is given, else the server's or the model's where it is on this machine, else None."""
    try:
        if given is not None:
            return load_tokenizer(given)
        for path in (facts.tokenizer_path, model):
            if path is not None and (path.startswith("config:") or Path(path).expanduser().exists()):
                return load_tokenizer(path)
    except TokenizerError as error:
        raise BenchmarkError(f"no tokenizer: {error}; say where one is with --tokenizer PATH") from error
    return None


def serving_config(args: argparse.Namespace, facts: ServerFacts) -> ServingConfig:
    options = RequestOptions(
        model=facts.model,
        temperature=args.temperature,
        ignore_eos=not args.disable_ignore_eos,
        stream=not args.disable_stream,
        return_logprob=args.return_logprob,
        extra_body=args.extra_request_body,
    )
    return ServingConfig(
        backend=args.backend,
        base_url=base_url(args),
        options=options,
        request_rate=args.request_rate,
        use_trace_timestamps=args.use_trace_timestamps,
        max_concurrency=args.max_concurrency,
        warmup_requests=args.warmup_requests,
        flush_cache=args.flush_cache,
        profile=args.profile,
        profile_output_dir=args.profile_output_dir,
        profile_num_steps=args.profile_num_steps,
        lora_names=tuple(args.lora_name),
        seed=args.seed,
        headers=headers(args),
        request_timeout_s=args.request_timeout_sec,
        show_progress=not args.disable_tqdm,
    )


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The data set's flags and the tag, for the result's JSON."""
    flags = argparse.ArgumentParser()
    datasets.add_arguments(flags)
    names = vars(flags.parse_args([]))
    return {name: getattr(args, name) for name in names if name != "num_prompts"} | {"tag": args.tag}


def report(run: ServingRun, args: argparse.Namespace) -> None:
    print(f"\n{standard_block(run)}")
    if run.roofline is not None:
        print(f"\n{roofline_block(run.roofline)}")
    sys.stdout.flush()
    for line in (*run.notes, failure_line(run)):
        if line is not None:
            say(TOOL, line)
    if args.output_file is not None:
        append_jsonl(args.output_file, run_json(run, args.output_details))
    if args.plot is not None:
        from sgl_jax.benchmark.plot import plot_run

        plot_run(run, args.plot)
