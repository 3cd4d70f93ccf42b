"""The work of `python -m sgl_jax.bench_serving`: a load on a server, and the figures of it."""

import argparse
import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.client import ServerError, base_url, connect, measured
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.figures import ServingRun, compute_figures, compute_shares, failure_line, standard_block
from sgl_jax.tools.benchmark.machine_limits import Roofline, server_roofline, shares_block
from sgl_jax.tools.benchmark.protocols import BACKENDS, NATIVE, Outcome, Prompt, RequestOptions, request_body
from sgl_jax.tools.benchmark.terminal import BenchmarkError, append_jsonl, check_writable, request_progress, say

TOOL = "bench_serving"
_WARM_UP_OUTPUT = 32  # tokens, at most
_POLL_S = 0.5
_NOT_DESCRIBED = {"header", "host", "port", "output_file", "output_details", "machine_limits", "disable_tqdm"}


@dataclass(frozen=True)
class ServerFacts:
    """Facts that a server states about itself. None: it does not."""

    model: str | None = None
    tokenizer_path: str | None = None
    vocab_size: int | None = None
    roofline: Roofline | None = None  # with --machine-limits
    simulated_acceptance: float | None = None


def main(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run what the flags say and print the result. Returns the exit code; raises BenchmarkError."""
    check_writable(args.output_file, "--output-file")
    facts = asyncio.run(ask_server(args))
    tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
    prompts = load_prompts(args, tokenizer, facts.vocab_size, args.seed)
    run = asyncio.run(run_serving(args, facts, prompts, tokenizer))
    print(f"\n{standard_block(run)}", flush=True)
    if run.shares is not None:
        print(f"\n{shares_block(run.shares)}", flush=True)
    if (failure := failure_line(run)) is not None:
        say(TOOL, failure)
    append_jsonl(args.output_file, run.json(args.output_details))
    return int(run.figures["failed"] > 0)


async def ask_server(args: argparse.Namespace) -> ServerFacts:
    """Ask the server about itself. Raises BenchmarkError when it does not answer in time, or --model is needed and it names none."""
    loop = asyncio.get_running_loop()
    end = loop.time() + (wait := args.ready_check_timeout_sec)
    async with connect(args) as client:
        while True:
            try:
                info = await client.server_info()
                model = args.served_model_name or args.model or await client.model_name()
                break
            except ServerError as error:
                if loop.time() + _POLL_S > end:
                    raise BenchmarkError(f"not ready after {wait:g} s: {error}" if wait else str(error)) from error
            await asyncio.sleep(_POLL_S)
    if model is None and BACKENDS[args.backend].protocol is not NATIVE:
        raise BenchmarkError(f"the server at {base_url(args)} names no model in /v1/models; give --model")
    engine = info.get("engine")  # a mapping in our servers; anything in others
    vocab_size = engine.get("vocab_size") if isinstance(engine, dict) else None
    simulated = info.get("speculative_simulated_acceptance")
    roofline = server_roofline(args.machine_limits, engine)
    return ServerFacts(model, info.get("tokenizer_path"), vocab_size, roofline, simulated)


def find_tokenizer(given: str | None, model: str | None, facts: ServerFacts) -> Tokenizer | None:
    """Load the tokenizer that is given, else the server's or the model's where it is on this machine, else None."""
    try:
        if given is not None:
            return load_tokenizer(given)
        for path in (facts.tokenizer_path, model):
            if path is not None and (path.startswith("config:") or Path(path).expanduser().exists()):
                return load_tokenizer(path)
    except TokenizerError as error:
        raise BenchmarkError(f"no tokenizer: {error}; say where one is with --tokenizer PATH") from error
    return None


async def run_serving(
    args: argparse.Namespace, facts: ServerFacts, prompts: Sequence[Prompt], tokenizer: Tokenizer | None = None
) -> ServingRun:
    """Run with the flags of bench_serving; failed requests are outcomes too. Raises BenchmarkError for no run."""
    if not prompts:
        raise BenchmarkError("the data set has no prompts")
    ignore_eos, stream = not args.disable_ignore_eos, not args.disable_stream
    options = RequestOptions(
        facts.model, args.temperature, ignore_eos, stream, args.return_logprob, args.extra_request_body
    )
    protocol = BACKENDS[args.backend].protocol
    times = sending_times(args, prompts)
    draw = random.Random(args.seed)
    loras = [draw.choice(args.lora_name) if args.lora_name else None for _ in prompts]
    short = replace(prompts[0], output_len=min(prompts[0].output_len, _WARM_UP_OUTPUT))
    # Encoded before the clock runs: the client shares the machine with what it measures.
    warm_up, *bodies = (
        msgspec.json.encode(request_body(protocol, prompt, options, lora))
        for prompt, lora in zip([short, *prompts], [loras[0], *loras], strict=True)
    )
    loop = asyncio.get_running_loop()
    async with connect(args) as client:

        async def send(body: bytes, prompt: Prompt) -> Outcome:
            return await measured(client, protocol, body, prompt.prompt_len, stream)

        warmed_up = await asyncio.gather(*(send(warm_up, short) for _ in range(args.warmup_requests)))
        if warmed_up and not any(outcome.ok for outcome in warmed_up):
            raise BenchmarkError(f"warming up failed: {warmed_up[0].error}")
        if args.flush_cache and not await client.flush_cache():
            raise BenchmarkError("--flush-cache: the server has no /flush_cache")
        profile = client.profile(args.profile_output_dir, args.profile_num_steps) if args.profile else nullcontext()
        with request_progress(len(prompts), not args.disable_tqdm) as advance:

            async def one(i: int) -> Outcome:
                outcome = await send(bodies[i], prompts[i])
                advance()
                return outcome

            drafts_before = await client.draft_counts()
            async with profile:
                start = loop.time()
                outcomes = await drive(one, times, args.max_concurrency)
                duration = loop.time() - start
            drafts = (await client.draft_counts()).since(drafts_before)
    count_tokens = None if tokenizer is None else lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    figures = compute_figures(outcomes, start, duration, count_tokens)
    figures["accept_length"] = drafts.accept_length if drafts.steps > 0 else None
    figures["simulated_acceptance"] = facts.simulated_acceptance
    shares = None if facts.roofline is None else compute_shares(outcomes, figures, facts.roofline)
    config = described(args) | {"model": facts.model, "num_prompts": len(prompts)}
    return ServingRun(config, start, outcomes, figures, shares)


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a reader of the result needs; not the headers, which may hold a key."""
    given = {name: value for name, value in vars(args).items() if name not in _NOT_DESCRIBED}
    rate = "inf" if args.request_rate == float("inf") else args.request_rate  # JSON has no infinity
    return given | {"base_url": base_url(args), "request_rate": "trace" if args.use_trace_timestamps else rate}


def sending_times(args: argparse.Namespace, prompts: Sequence[Prompt]) -> list[float]:
    """Return when each prompt is sent, in seconds: at the data set's times, the earliest being 0, or as a Poisson process."""
    if args.use_trace_timestamps:
        known = [prompt.arrival_s for prompt in prompts if prompt.arrival_s is not None]
        if len(known) < len(prompts):
            raise BenchmarkError(
                f"--use-trace-timestamps: {len(prompts) - len(known)} of {len(prompts)} prompts have no time; "
                "use a data set with times (mooncake), or --request-rate"
            )
        return [time - min(known) for time in known]
    if args.request_rate == float("inf"):
        return [0.0] * len(prompts)
    gaps = np.random.default_rng(args.seed).exponential(1.0 / args.request_rate, len(prompts) - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


async def drive(
    send: Callable[[int], Awaitable[Outcome]], times: Sequence[float], max_concurrency: int | None
) -> list[Outcome]:
    """Call `send(i)` at `times[i]` seconds from now, at most `max_concurrency` at a time; the others wait their turn."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    turns = asyncio.Semaphore(max_concurrency or len(times))

    async def one(i: int) -> Outcome:
        await asyncio.sleep(start + times[i] - loop.time())
        async with turns:
            return await send(i)

    return await asyncio.gather(*map(one, range(len(times))))
