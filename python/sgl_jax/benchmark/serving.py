"""A load on a server and what it measured: warm up, flush, ask for the machine's limits, send, compute."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from sgl_jax.benchmark.client import REQUEST_TIMEOUT_S, Client, ServerError, connect, measured, model_cost
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.figures import ServingRun, compute_figures, compute_roofline
from sgl_jax.benchmark.progress import request_progress
from sgl_jax.benchmark.protocols import BACKENDS, RequestOptions, request_body
from sgl_jax.benchmark.records import Outcome, Prompt
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost
from sgl_jax.benchmark.traffic import drive, poisson_times, trace_times
from sgl_jax.text.tokenizer import Tokenizer

WARMUP_OUTPUT_LEN = 32  # tokens, at most


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
        """What a reader of the result needs, without the headers, which may hold a key."""
        rate: float | str = "trace" if self.use_trace_timestamps else self.request_rate
        return {
            "backend": self.backend,
            "base_url": self.base_url,
            "model": self.options.model,
            "request_rate": "inf" if rate == float("inf") else rate,  # JSON has no infinity
            "max_concurrency": self.max_concurrency,
            "warmup_requests": self.warmup_requests,
            "flush_cache": self.flush_cache,
            "temperature": self.options.temperature,
            "ignore_eos": self.options.ignore_eos,
            "stream": self.options.stream,
            "return_logprob": self.options.return_logprob,
            "extra_request_body": dict(self.options.extra_body),
            "lora_names": list(self.lora_names),
            "profile": self.profile,
            "seed": self.seed,
        }


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
    times = (
        trace_times(prompts)
        if config.use_trace_timestamps
        else poisson_times(len(prompts), config.request_rate, config.seed)
    )
    draw = random.Random(config.seed)
    loras = [draw.choice(config.lora_names) if config.lora_names else None for _ in prompts]
    # Encoded before the clock runs: the client shares the machine with what it measures.
    bodies = [
        msgspec.json.encode(request_body(protocol, prompt, config.options, lora))
        for prompt, lora in zip(prompts, loras, strict=True)
    ]
    notes: list[str] = []
    async with connect(config.base_url, config.headers, config.request_timeout_s) as client:
        await _warm_up(client, config, prompts[0], loras[0])
        if config.flush_cache:
            await client.flush_cache()
        limits, cost = await _limits(client, notes)
        loop = asyncio.get_running_loop()

        async def send(i: int) -> Outcome:
            return await measured(client, protocol, bodies[i], prompts[i].prompt_len, config.options.stream)

        with request_progress(len(prompts), config.show_progress) as advance:
            async with _profile(client, config, notes):
                start = loop.time()
                sent, complete = await drive(send, times, config.max_concurrency, lambda outcome: advance())
                duration = loop.time() - start
    outcomes = [outcome for outcome in sent if outcome is not None]
    count_tokens = None if tokenizer is None else lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    figures = compute_figures(outcomes, start, duration, count_tokens)
    roofline = compute_roofline(outcomes, figures, duration, limits, cost) if limits and cost else None
    if not complete:
        notes.append(f"interrupted: {len(prompts) - len(outcomes)} of {len(prompts)} requests were not finished")
    described = config.described() | {"num_prompts": len(prompts)} | dict(settings or {})
    return ServingRun(described, start, duration, outcomes, figures, roofline, not complete, notes)


async def _warm_up(client: Client, config: ServingConfig, prompt: Prompt, lora: str | None) -> None:
    """Sends the first prompt, with a short output, as often as asked and all at a time."""
    if not config.warmup_requests:
        return
    protocol = BACKENDS[config.backend].protocol
    short = replace(prompt, output_len=min(prompt.output_len, WARMUP_OUTPUT_LEN))
    body = msgspec.json.encode(request_body(protocol, short, config.options, lora))
    sent = [
        measured(client, protocol, body, prompt.prompt_len, config.options.stream)
        for _ in range(config.warmup_requests)
    ]
    outcomes = await asyncio.gather(*sent)
    if not any(outcome.ok for outcome in outcomes):
        raise BenchmarkError(f"warming up failed: {outcomes[0].error}")


async def _limits(client: Client, notes: list[str]) -> tuple[MachineLimits | None, ModelCost | None]:
    try:
        limits = await client.measure_limits()
        cost = None if limits is None else model_cost(await client.server_info())
    except ServerError as error:
        notes.append(f"the machine's limits could not be measured: {error}")
        return None, None
    if limits is None or cost is None:
        notes.append("this server does not report the limits of its machine, so no share of them is given")
    return limits, cost


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
