"""The work of `python -m sgl_jax.bench_serving`: a load on a server, and what it measured."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.arguments import base_url, dataset_settings, headers
from sgl_jax.tools.benchmark.client import Client, ServerError, allow_many_connections, connect, measured
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.figures import ServingRun, compute_figures, compute_shares
from sgl_jax.tools.benchmark.plot import check_plot, plot_run
from sgl_jax.tools.benchmark.protocols import BACKENDS, NATIVE, RequestOptions, request_body
from sgl_jax.tools.benchmark.records import Outcome, Prompt
from sgl_jax.tools.benchmark.roofline import Roofline, server_roofline
from sgl_jax.tools.benchmark.serving_report import (
    append_jsonl,
    check_writable,
    failure_line,
    run_json,
    shares_block,
    standard_block,
)
from sgl_jax.tools.benchmark.terminal import INTERRUPTED, SOME_FAILED, BenchmarkError, request_progress, say
from sgl_jax.tools.benchmark.traffic import drive, poisson_times, trace_times

TOOL = "bench_serving"
WARMUP_OUTPUT_LEN = 32  # tokens, at most


@dataclass(frozen=True)
class ServerFacts:
    """Facts that a server states about itself. None: it does not."""

    model: str | None
    tokenizer_path: str | None
    vocab_size: int | None
    roofline: Roofline | None  # with --machine-limits


def serve_load(args: argparse.Namespace) -> int:
    """Runs what the flags say and prints the result. Returns the exit code; raises BenchmarkError."""
    if args.plot is not None:
        check_plot(args.plot)  # what is missing is said before the run, not after it
    check_writable(args.output_file, "--output-file")
    allow_many_connections()
    facts = asyncio.run(ask_server(args))
    tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
    prompts = load_prompts(args, tokenizer, facts.vocab_size, args.seed)
    run = asyncio.run(run_serving(args, facts, prompts, tokenizer))
    report(run, args)
    if run.interrupted:
        return INTERRUPTED
    return SOME_FAILED if run.figures["failed"] else 0


async def ask_server(args: argparse.Namespace) -> ServerFacts:
    """Raises BenchmarkError when the server does not answer, or --model is needed and it names none."""
    async with connect(base_url(args), headers(args)) as client:
        if args.ready_check_timeout_sec:
            await client.wait_until_ready(args.ready_check_timeout_sec)
        info = await client.server_info()
        model = args.served_model_name or args.model or await client.model_name()
    if model is None and BACKENDS[args.backend].protocol is not NATIVE:
        raise BenchmarkError(f"the server at {base_url(args)} names no model in /v1/models; give --model")
    engine = info.get("engine")  # of ours a mapping; another server's may be anything
    vocab_size = engine.get("vocab_size") if isinstance(engine, dict) else None
    roofline = server_roofline(args.machine_limits, engine)
    return ServerFacts(model, info.get("tokenizer_path"), vocab_size, roofline)


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


def report(run: ServingRun, args: argparse.Namespace) -> None:
    print(f"\n{standard_block(run)}")
    if run.shares is not None:
        print(f"\n{shares_block(run.shares)}")
    sys.stdout.flush()
    for line in (*run.notes, failure_line(run)):
        if line is not None:
            say(TOOL, line)
    append_jsonl(args.output_file, run_json(run, args.output_details))
    if args.plot is not None:
        plot_run(run, args.plot)


# --- a run --------------------------------------------------------------------------------------------------------------


async def run_serving(
    args: argparse.Namespace, facts: ServerFacts, prompts: Sequence[Prompt], tokenizer: Tokenizer | None = None
) -> ServingRun:
    """With the flags of bench_serving. Raises BenchmarkError when the run cannot be made.

    Requests that fail are in the outcomes. Cancelled while requests run, it returns what is finished.
    """
    options = _options(args, facts.model)
    protocol = BACKENDS[args.backend].protocol
    if not prompts:
        raise BenchmarkError("the data set has no prompts")
    if args.use_trace_timestamps:
        times = trace_times(prompts)
    else:
        times = poisson_times(len(prompts), args.request_rate, args.seed)
    draw = random.Random(args.seed)
    loras = [draw.choice(args.lora_name) if args.lora_name else None for _ in prompts]

    def encoded(prompt: Prompt, lora: str | None) -> bytes:
        return msgspec.json.encode(request_body(protocol, prompt, options, lora))

    # Encoded before the clock runs: the client shares the machine with what it measures.
    bodies = [encoded(prompt, lora) for prompt, lora in zip(prompts, loras, strict=True)]
    short = replace(prompts[0], output_len=min(prompts[0].output_len, WARMUP_OUTPUT_LEN))
    notes: list[str] = []
    loop = asyncio.get_running_loop()
    async with connect(base_url(args), headers(args), args.request_timeout_sec) as client:

        async def send(body: bytes, prompt: Prompt) -> Outcome:
            return await measured(client, protocol, body, prompt.prompt_len, options.stream)

        warm_up = (send(encoded(short, loras[0]), short) for _ in range(args.warmup_requests))
        warmed_up = await asyncio.gather(*warm_up)
        if warmed_up and not any(outcome.ok for outcome in warmed_up):
            raise BenchmarkError(f"warming up failed: {warmed_up[0].error}")
        if args.flush_cache and not await client.flush_cache():
            raise BenchmarkError("--flush-cache: the server has no /flush_cache")
        with request_progress(len(prompts), not args.disable_tqdm) as advance:

            async def one(i: int) -> Outcome:
                outcome = await send(bodies[i], prompts[i])
                advance()
                return outcome

            async with _profile(client, args, notes):
                start = loop.time()
                sent, complete = await drive(one, times, args.max_concurrency)
                duration = loop.time() - start
    outcomes = [outcome for outcome in sent if outcome is not None]
    count_tokens = None if tokenizer is None else lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    figures = compute_figures(outcomes, start, duration, count_tokens)
    shares = None if facts.roofline is None else compute_shares(outcomes, figures, duration, facts.roofline)
    if not complete:
        notes.append(f"interrupted: {len(prompts) - len(outcomes)} of {len(prompts)} requests were not finished")
    return ServingRun(
        _described(args, options, len(prompts)), start, duration, outcomes, figures, shares, not complete, notes
    )


def _options(args: argparse.Namespace, model: str | None) -> RequestOptions:
    return RequestOptions(
        model=model,
        temperature=args.temperature,
        ignore_eos=not args.disable_ignore_eos,
        stream=not args.disable_stream,
        return_logprob=args.return_logprob,
        extra_request_body=args.extra_request_body,
    )


def _described(args: argparse.Namespace, options: RequestOptions, num_prompts: int) -> dict[str, Any]:
    """The settings that a reader of the result needs; not the headers, which may hold a key."""
    rate: float | str = "trace" if args.use_trace_timestamps else args.request_rate
    same = ("backend", "max_concurrency", "warmup_requests", "flush_cache", "profile", "seed", "tag")
    return {
        "base_url": base_url(args),
        **asdict(options),
        "request_rate": "inf" if rate == float("inf") else rate,  # JSON has no infinity
        "lora_names": args.lora_name,
        **{name: getattr(args, name) for name in same},
        **dataset_settings(args),
        "num_prompts": num_prompts,
    }


@asynccontextmanager
async def _profile(client: Client, args: argparse.Namespace, notes: list[str]) -> AsyncIterator[None]:
    if not args.profile:
        yield
        return
    await client.start_profile(args.profile_output_dir, args.profile_num_steps)
    yield
    try:
        await client.stop_profile()
    except ServerError as error:
        if args.profile_num_steps is None:  # otherwise it has stopped by itself
            notes.append(f"the profile could not be stopped: {error}")
