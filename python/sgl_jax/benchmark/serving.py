"""What `python -m sgl_jax.bench_serving` does with its flags: a load on a server, and what it measured."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from sgl_jax.benchmark.arguments import base_url, dataset_settings, headers
from sgl_jax.benchmark.client import (
    REQUEST_TIMEOUT_S,
    Client,
    ServerError,
    allow_many_connections,
    connect,
    measured,
)
from sgl_jax.benchmark.datasets import load_prompts
from sgl_jax.benchmark.figures import ServingRun, compute_figures, compute_shares
from sgl_jax.benchmark.plot import check_plot, plot_run
from sgl_jax.benchmark.protocols import BACKENDS, NATIVE, RequestOptions, request_body
from sgl_jax.benchmark.records import Outcome, Prompt
from sgl_jax.benchmark.report import append_jsonl, check_writable, failure_line, run_json, shares_block, standard_block
from sgl_jax.benchmark.roofline import Roofline
from sgl_jax.benchmark.terminal import INTERRUPTED, SOME_FAILED, BenchmarkError, request_progress, say
from sgl_jax.benchmark.traffic import drive, poisson_times, trace_times
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

TOOL = "bench_serving"
WARMUP_OUTPUT_LEN = 32  # tokens, at most
# Of a run's settings, those that say nothing about its result. Headers may hold a key.
_NOT_DESCRIBED = {"options", "headers", "use_trace_timestamps", "request_timeout_s", "show_progress"}


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself. None: it does not."""

    model: str | None
    tokenizer_path: str | None
    vocab_size: int | None


def serve_load(args: argparse.Namespace) -> int:
    """Runs what the flags say and prints the result. Returns the exit code; raises BenchmarkError."""
    if args.plot is not None:
        check_plot(args.plot)  # what is missing is said before the run, not after it
    if args.output_file is not None:
        check_writable(args.output_file)
    allow_many_connections()
    facts = asyncio.run(ask_server(args))
    tokenizer = find_tokenizer(args.tokenizer, args.model, facts)
    prompts = load_prompts(args, tokenizer, facts.vocab_size, args.seed)
    run = asyncio.run(run_serving(serving_config(args, facts), prompts, tokenizer, data_settings(args)))
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
    return ServerFacts(model, info.get("tokenizer_path"), (info.get("engine") or {}).get("vocab_size"))


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
        extra_request_body=args.extra_request_body,
    )
    same = {each.name: getattr(args, each.name) for each in fields(ServingConfig) if hasattr(args, each.name)}
    other: dict[str, Any] = {
        "base_url": base_url(args),
        "options": options,
        "lora_names": tuple(args.lora_name),
        "headers": headers(args),
        "request_timeout_s": args.request_timeout_sec,
        "show_progress": not args.disable_tqdm,
    }
    return ServingConfig(**same | other)


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The data set's flags and the tag, for the result's JSON, which has the number of prompts that were sent."""
    settings = dataset_settings(args)
    del settings["num_prompts"]
    return settings | {"tag": args.tag}


def report(run: ServingRun, args: argparse.Namespace) -> None:
    print(f"\n{standard_block(run)}")
    if run.shares is not None:
        print(f"\n{shares_block(run.shares)}")
    sys.stdout.flush()
    for line in (*run.notes, failure_line(run)):
        if line is not None:
            say(TOOL, line)
    if args.output_file is not None:
        append_jsonl(args.output_file, run_json(run, args.output_details))
    if args.plot is not None:
        plot_run(run, args.plot)


# --- a run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServingConfig:
    """What is sent to which server, and how."""

    backend: str  # a name in BACKENDS
    base_url: str
    options: RequestOptions = field(default_factory=RequestOptions)
    request_rate: float = float("inf")  # requests per second
    use_trace_timestamps: bool = False
    max_concurrency: int | None = None
    warmup_requests: int = 1
    flush_cache: bool = False  # after warming up
    profile: bool = False
    profile_output_dir: str | None = None
    profile_num_steps: int | None = None
    lora_names: tuple[str, ...] = ()  # one is drawn for each request
    seed: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    request_timeout_s: float = REQUEST_TIMEOUT_S
    show_progress: bool = True

    def described(self) -> dict[str, Any]:
        """What a reader of the result needs."""
        rate: float | str = "trace" if self.use_trace_timestamps else self.request_rate
        settings = {name: value for name, value in vars(self).items() if name not in _NOT_DESCRIBED}
        settings["request_rate"] = "inf" if rate == float("inf") else rate  # JSON has no infinity
        return settings | asdict(self.options)


async def run_serving(
    config: ServingConfig,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ServingRun:
    """`settings` are what else describes the run, for its JSON. Raises BenchmarkError when the run cannot be made.

    Requests that fail are in the outcomes. Cancelled while requests run, it returns what is finished.
    """
    protocol = BACKENDS[config.backend].protocol
    if not prompts:
        raise BenchmarkError("the data set has no prompts")
    if config.use_trace_timestamps:
        times = trace_times(prompts)
    else:
        times = poisson_times(len(prompts), config.request_rate, config.seed)
    draw = random.Random(config.seed)
    loras = [draw.choice(config.lora_names) if config.lora_names else None for _ in prompts]

    def encoded(prompt: Prompt, lora: str | None) -> bytes:
        return msgspec.json.encode(request_body(protocol, prompt, config.options, lora))

    # Encoded before the clock runs: the client shares the machine with what it measures.
    bodies = [encoded(prompt, lora) for prompt, lora in zip(prompts, loras, strict=True)]
    short = replace(prompts[0], output_len=min(prompts[0].output_len, WARMUP_OUTPUT_LEN))
    notes: list[str] = []
    loop = asyncio.get_running_loop()
    async with connect(config.base_url, config.headers, config.request_timeout_s) as client:

        async def send(body: bytes, prompt: Prompt) -> Outcome:
            return await measured(client, protocol, body, prompt.prompt_len, config.options.stream)

        warm_up = (send(encoded(short, loras[0]), short) for _ in range(config.warmup_requests))
        warmed_up = await asyncio.gather(*warm_up)
        if warmed_up and not any(outcome.ok for outcome in warmed_up):
            raise BenchmarkError(f"warming up failed: {warmed_up[0].error}")
        if config.flush_cache and not await client.flush_cache():
            raise BenchmarkError("--flush-cache: the server has no /flush_cache")
        roofline = await _roofline(client, notes)
        with request_progress(len(prompts), config.show_progress) as advance:
            async with _profile(client, config, notes):
                start = loop.time()
                sent, complete = await drive(
                    lambda i: send(bodies[i], prompts[i]), times, config.max_concurrency, lambda outcome: advance()
                )
                duration = loop.time() - start
    outcomes = [outcome for outcome in sent if outcome is not None]
    count_tokens = None if tokenizer is None else lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    figures = compute_figures(outcomes, start, duration, count_tokens)
    shares = None if roofline is None else compute_shares(outcomes, figures, duration, roofline)
    if not complete:
        notes.append(f"interrupted: {len(prompts) - len(outcomes)} of {len(prompts)} requests were not finished")
    described = config.described() | {"num_prompts": len(prompts)} | dict(settings or {})
    return ServingRun(described, start, duration, outcomes, figures, shares, not complete, notes)


async def _roofline(client: Client, notes: list[str]) -> Roofline | None:
    try:
        found = await client.roofline()
    except ServerError as error:
        notes.append(str(error))
        return None
    if found is None:
        notes.append("this server does not report the limits of its machine, so no share of them is given")
    return found


@asynccontextmanager
async def _profile(client: Client, config: ServingConfig, notes: list[str]) -> AsyncIterator[None]:
    if not config.profile:
        yield
        return
    await client.start_profile(config.profile_output_dir, config.profile_num_steps)
    yield
    try:
        await client.stop_profile()
    except ServerError as error:
        if config.profile_num_steps is None:  # otherwise it has stopped by itself
            notes.append(f"the profile could not be stopped: {error}")
