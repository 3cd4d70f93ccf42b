"""A scheduler, and a whole engine core, over a device whose output can be computed by hand."""

from __future__ import annotations

import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.request import Request, SamplingParams
from sgl_jax.scheduler.scheduler import Scheduler, SchedulerConfig
from sgl_jax.testing.fake_core import fake_info
from sgl_jax.testing.fake_runner import FakeRunner


def make_scheduler(
    *,
    num_usable_pages: int = 64,
    page_size: int = 4,
    rows: int = 4,
    context_length: int = 64,
    step_tokens: int = 16,
    prefill_tokens: int | None = None,
    policy: str = "fcfs",
    radix: bool = True,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(rows, context_length, step_tokens, prefill_tokens or step_tokens, policy),
        PrefixCache(num_usable_pages + 1, page_size, enabled=radix),
    )


def make_request(
    key: int, prompt: list[int], *, max_tokens: int = 40, stop: tuple[int, ...] = (), namespace: str = "", **params
) -> Request:
    """Arrives in the order of keys."""
    return Request(
        key=key,
        prompt=np.array(prompt, np.int32),
        params=SamplingParams(max_tokens=max_tokens, **params),
        namespace=namespace,
        seed=key,
        max_total_tokens=len(prompt) + max_tokens,
        stop_token_ids=np.array(stop, np.int32),
        arrival=key,
    )


def make_core(
    *,
    overlap: bool = True,
    vocab_size: int = 512,
    step_seconds: float = 0.0,
    random_seed: int | None = 0,
    eos: int = 511,
    **scheduler_options,
) -> Core:
    scheduler = make_scheduler(**scheduler_options)
    config, cache = scheduler.config, scheduler.cache
    runner = FakeRunner(
        num_rows=config.max_running_requests,
        num_pages=cache.num_usable_pages + 1,
        page_size=cache.page_size,
        context_length=config.context_length,
        vocab_size=vocab_size,
        step_seconds=step_seconds,
    )
    info = fake_info(vocab_size=vocab_size, context_length=config.context_length, eos_token_id=eos)
    return Core(scheduler, runner, info, overlap=overlap, random_seed=random_seed)
