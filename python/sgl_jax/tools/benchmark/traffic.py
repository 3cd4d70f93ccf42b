"""When each request of a run is sent: at once, as a Poisson process, or at the times a trace gives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from sgl_jax.tools.benchmark.records import Outcome, Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError


def poisson_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start, from 0 on: gaps are drawn from an exponential distribution with mean 1 / rate."""
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, max(count - 1, 0))
    return [0.0, *(float(t) for t in np.cumsum(gaps))][:count]


def trace_times(prompts: Sequence[Prompt]) -> list[float]:
    """The data set's own times, the earliest being 0. Raises BenchmarkError when it has none."""
    times = [prompt.arrival_s for prompt in prompts]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        raise BenchmarkError(
            f"--use-trace-timestamps: {len(times) - len(known)} of {len(times)} prompts have no time; "
            "use a data set with times (mooncake), or --request-rate"
        )
    return [time - min(known) for time in known]


async def drive(
    send: Callable[[int], Awaitable[Outcome]],
    times: Sequence[float],
    max_concurrency: int | None,
) -> tuple[list[Outcome | None], bool]:
    """Calls `send(i)` at `times[i]` seconds from now, at most `max_concurrency` at a time; the others wait their turn.

    Returns the outcomes in order, and whether all ran. When cancelled it ends the requests that run and returns what is
    finished, with None for the rest: a run that was stopped still has its figures.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    outcomes: list[Outcome | None] = [None] * len(times)
    turns = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def one(i: int) -> None:
        async with turns:
            outcomes[i] = await send(i)

    try:
        async with asyncio.TaskGroup() as group:
            for i in sorted(range(len(times)), key=times.__getitem__):
                if (wait := start + times[i] - loop.time()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(i))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return outcomes, False
    return outcomes, True
