"""Measured time of a full step in each bucket of a launch, beside the least times that its plan counts."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from sgl_jax.planning.cost import Bound, Rates, StepCost
from sgl_jax.planning.fit import Plan
from sgl_jax.planning.target import find_target
from sgl_jax.planning.topology import CHIPS, NoSuchTopology, parse
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.programs import RunnerConfig, step_name
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.step_plan import RowLoad, StepPlan

# Kinds of devices, as jax names them, whose maker's rates planning/topology.py has.
_CHIP_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


@dataclasses.dataclass(frozen=True)
class MeasuredStep:
    program: str
    kind: Literal["decode", "prompt"]
    cost: StepCost
    bound: Bound | None  # None: the rates are unknown
    seconds: list[float]
    median_seconds: float
    tokens: int  # in the bucket, as the rows
    rows: int
    computed_tokens: int  # fewer where the pool has no room for a full step

    def as_json(self) -> dict[str, object]:
        """Return the step, its least times in seconds, and the share: the least of the step over the median."""
        data, bound = dataclasses.asdict(self), self.bound
        cost, _ = data.pop("cost"), data.pop("bound")
        if bound is None:
            return data | cost
        times = {"compute_seconds": bound.compute_s, "memory_seconds": bound.memory_s, "links_seconds": bound.links_s}
        least = {"least_seconds": bound.seconds, "in_turn_seconds": bound.in_turn_s, "limit": bound.limit}
        is_full = self.computed_tokens == self.tokens  # the least times are those of a full step
        return data | cost | times | least | {"share": bound.seconds / self.median_seconds if is_full else None}


def maker_rates(device_kind: str, num_devices: int, dtype: str) -> Rates | None:
    """Return the maker's rates of so many devices, in the smallest topology that has them. None: they are not known."""
    if (chip := _CHIP_OF_KIND.get(device_kind)) is None:
        return None
    number = -(-num_devices // CHIPS[chip].devices_per_chip)
    try:
        name = parse(f"{chip}-{1 << (number - 1).bit_length()}").name
    except NoSuchTopology:
        return None
    return find_target(name, num_devices).rates(dtype)


def context_for_all_rows(config: RunnerConfig, wanted: int) -> int:
    """Return how many tokens every running row can have in the pool at the same time: those wanted, or fewer."""
    in_pool = (config.num_pages - 1) // config.num_rows * config.page_size
    return min(wanted, config.context_length, in_pool)


def full_step(config: RunnerConfig, bucket: Bucket, context: int) -> StepPlan:
    """Return the step that `planning.cost.step_cost` counts for a bucket on one data rank, with width 1.

    It is a token of each row behind `context` - 1 others; or whole prompts of `context` tokens, as many as the bucket has
    rows for; or the end of one prompt. Every row has pages of its own, loaded by the plan, and is sampled greedily.
    """
    rows, tokens = min(bucket.num_rows, config.num_rows), bucket.num_tokens
    if bucket.decodes:
        num_new, start = np.ones(rows, np.int32), np.full(rows, context - 1, np.int32)
    else:
        whole, rest = divmod(tokens, context)
        num_new = np.array([*[context] * whole, *[rest] * (rest > 0)], np.int32)[:rows]
        start = np.full(len(num_new), context - tokens if tokens <= context else 0, np.int32)
    each = -(-context // config.page_size)
    pages = 1 + np.arange(len(num_new) * each, dtype=np.int32).reshape(len(num_new), each)
    loads = [RowLoad(row, own, None) for row, own in enumerate(pages)]
    return StepPlan.of(num_new, loads=loads, start=start, samples=np.ones(len(num_new), np.bool_))


def step_seconds(
    runner: ModelRunner, plan: StepPlan, runs: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the seconds of each of `runs` steps, from its launch until its tokens are on the host, behind one that is not
    counted."""
    runner.launch(plan).collect()
    seconds, again = [], dataclasses.replace(plan, loads=[])
    for _ in range(runs):
        started = clock()
        runner.launch(again).collect()
        seconds.append(clock() - started)
    return seconds


def measured_steps(runner: ModelRunner, plan: Plan, rates: Rates | None, runs: int) -> Iterator[MeasuredStep]:
    """Measure a full step of each bucket of the plan, with its least times at these rates, or else at the plan's own."""
    for step in plan.steps:
        bucket, bound = step.bucket, step.cost.bound(rates) if rates else step.bound
        full = full_step(runner.config, bucket, plan.context)
        seconds = step_seconds(runner, full, runs)
        kind: Literal["decode", "prompt"] = "decode" if bucket.decodes else "prompt"
        sizes = {"tokens": bucket.num_tokens, "rows": bucket.num_rows, "computed_tokens": full.num_tokens}
        yield MeasuredStep(step_name(bucket), kind, step.cost, bound, seconds, float(np.median(seconds)), **sizes)
