"""Measure the engine thread's time for a steady decode step: scheduling, packing, collecting, stop checks; no device time.

    python benchmarks/step_overhead.py --output benchmarks/step_overhead.json

The runner packs each plan into its vector, as the real one does, and answers at once with the same token for every row.
The bar (docs/architecture.md) is 300 us at 256 rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Generate
from sgl_jax.request import SamplingParams
from sgl_jax.runtime.buckets import make_buckets, pick
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.tracing import JaxTracer
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.step_plan import StepPlan, StepTokens

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from fakes.fake_core import fake_info

PAGE_SIZE = 16
PROMPT_TOKENS = 1000
STEP_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Flight:
    plan: StepPlan
    result: StepTokens

    def collect(self) -> StepTokens:
        assert not self.plan.wants_logprobs
        assert not self.plan.wants_prompt_logprobs
        return self.result


class PackingRunner:
    """Runner that does all host work of ModelRunner except the dispatch."""

    compiles_after_ready = num_compiling = 0

    def __init__(self, num_rows: int, num_ranks: int):
        self.tracer = JaxTracer()  # a step enters its annotations whether they are recorded or not
        self.buckets = make_buckets(STEP_TOKENS, num_rows, 8)
        self.layouts = {bucket: PlanLayout(bucket, PAGE_SIZE, num_rows, num_ranks) for bucket in self.buckets}
        self.tokens, self.accepted = np.full((num_rows, 1), 7, np.int32), np.ones(num_rows, np.int32)
        self.drafted = np.zeros(num_rows, np.int32)

    def can_launch(self, plan: StepPlan) -> bool:
        return True

    def close(self) -> None: ...

    def launch(self, plan: StepPlan) -> Flight:
        num_rows = len(plan.rows)
        self.layouts[pick(self.buckets, plan.num_tokens, num_rows, plan.width)].pack(plan)
        per_row = (each[:num_rows] for each in (self.tokens, self.accepted, self.drafted))
        return Flight(plan, StepTokens(*per_row, None, None))


def steady_core(num_rows: int, num_steps: int, *, overlap: bool, num_ranks: int = 1) -> Core:
    """Make a core whose num_rows requests, over all data ranks, decode for at least num_steps more."""
    assert num_rows % num_ranks == 0
    rows_of_rank = num_rows // num_ranks
    context_length = PROMPT_TOKENS + num_rows + num_steps + 64  # the first to decode wait for the last
    num_pages = rows_of_rank * -(-context_length // PAGE_SIZE) + 1
    scheduler = Scheduler(
        SchedulerConfig(rows_of_rank, context_length, STEP_TOKENS // num_ranks, STEP_TOKENS // num_ranks),
        [PrefixCache(num_pages, PAGE_SIZE) for _ in range(num_ranks)],
    )
    core = Core(
        scheduler, PackingRunner(num_rows, num_ranks), fake_info(context_length=context_length), overlap=overlap
    )
    for key in range(num_rows):
        # Each request has its own prompt, and lengths differ so that pages fill at different steps.
        prompt = [key + 1, *range(100, 100 + PROMPT_TOKENS - 1 - key % PAGE_SIZE)]
        core.handle(Generate(key, prompt, SamplingParams(ignore_eos=True)))
    while scheduler.waiting or not scheduler.table.has_sampled.all():
        core.step()
    return core


def measure(num_rows: int, num_steps: int, *, overlap: bool, num_ranks: int = 1) -> np.ndarray:
    """Measure each step, f64[num_steps] in microseconds."""
    core = steady_core(num_rows, num_steps + 50, overlap=overlap, num_ranks=num_ranks)
    for _ in range(20):
        core.step()
    times = np.empty(num_steps)
    gc.collect()
    for i in range(num_steps):
        start = time.perf_counter()
        core.step()
        times[i] = time.perf_counter() - start
    assert core.scheduler.num_running == num_rows
    return times * 1e6


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout
    return head.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--dp-size", type=int, default=1, help="data ranks the rows are spread over")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    for overlap in (True, False):
        for num_rows in args.rows:
            times = measure(num_rows, args.steps, overlap=overlap, num_ranks=args.dp_size)
            p50, p99 = np.percentile(times, [50, 99])
            results.append(
                {
                    "rows": num_rows,
                    "dp_size": args.dp_size,
                    "overlap": overlap,
                    "steps": args.steps,
                    "mean_us": round(float(times.mean()), 1),
                    "p50_us": round(float(p50), 1),
                    "p99_us": round(float(p99), 1),
                }
            )
            print(results[-1])
    report = {
        "what": "engine-thread time per steady decode step, device time excluded, packing included",
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": version("numpy"), "jax": version("jax")},
        "page_size": PAGE_SIZE,
        "prompt_tokens": PROMPT_TOKENS,
        "results": results,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
