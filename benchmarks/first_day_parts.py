"""Parts of benchmarks/first_day.py, each run by it in a process of its own: `python first_day_parts.py PART FOLDER SECONDS MODEL FLAGS`.

A part writes what it has found so far to FOLDER/PART.json, again with each result, so that a part which is ended leaves
its figures. Its exit code is 0 when it passed; else "error" in the file says why, if the part itself could.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec

from sgl_jax.engine.startup import build_core
from sgl_jax.planning.fit import Misfit, held_on, launch_of, make_plan
from sgl_jax.planning.model import find_model
from sgl_jax.planning.target import target_here
from sgl_jax.runtime.platform import pick_devices
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.settings.server_args import ServerArgs, environment
from sgl_jax.tools.benchmark import one_batch
from sgl_jax.tools.benchmark.arguments import alone_arguments, parse
from sgl_jax.tools.benchmark.bucket_steps import context_for_all_rows, maker_rates, measured_steps
from sgl_jax.tools.benchmark.terminal import start_log
from sgl_jax.tools.environment.check_command import look
from sgl_jax.tools.selftest.exactness import GreedyAnswer, compare, greedy_answers
from sgl_jax.tools.selftest.numerics import check_line, checks

MODELS = {"cpu": ["Qwen3-0.6B"], "other": ["Qwen3-8B", "Qwen3-4B", "Qwen3-0.6B"]}  # the first that fits is the default
CONTEXT = 1024  # tokens of a row in a step, at most
RUNS = 5  # how often each step is timed
# (batch sizes, tokens of a prompt, tokens to generate)
BATCHES = {"cpu": ([1, 4], 64, 8), "other": ([1, 8, 32], 512, 32)}


class PartFailed(Exception):
    """The part has found what is wrong."""


@dataclasses.dataclass
class Part:
    """Part that runs in this process, and what it has found so far."""

    name: str
    folder: Path
    limit_s: float
    model: str  # path; empty: the default model
    flags: Sequence[str]  # the server's other flags
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tell(self, **found: Any) -> None:
        """Add findings to the part's file, which is whole whenever the process is ended."""
        self.found |= found
        new = self.folder / f"{self.name}.new"
        new.write_text(json.dumps(self.found), encoding="utf-8")
        new.replace(self.folder / f"{self.name}.json")

    @property
    def args(self) -> ServerArgs:
        """The server's arguments, for a part that brings a model of its own."""
        return alone_arguments([*self.flags, "--model-path", "none"])

    def flags_with_model(self) -> list[str]:
        """Return all flags of a launch. Raises PartFailed if no model was named and none of ours fits."""
        if self.model:
            return [*self.flags, "--model-path", self.model]
        target = target_here(self.args.device, self.args.num_devices)
        for name in MODELS.get(target.platform.name, MODELS["other"]):
            flags = [*self.flags, "--model-path", f"config:{name}", "--load-format", "dummy"]
            args = alone_arguments(flags)
            with contextlib.suppress(Misfit):
                launch_of(args, held_on(target, args, find_model(args)), target)
                return flags
        raise PartFailed("no bundled model fits these devices; give a smaller one with --model-path")


def environment_part(part: Part) -> None:
    """Look at the machine as check_env does."""
    report = look(environment(), 0.8 * part.limit_s)
    part.tell(report=dataclasses.asdict(report))
    wanted = part.args.device
    verdict = next((each for each in report.verdicts if each.platform == wanted), None)
    if verdict is not None and not verdict.usable:
        raise PartFailed(f"{wanted} is not usable: {verdict.summary}")


def selftest_part(part: Part) -> None:
    """Check every kernel and a small model against references, as check_env --selftest does."""
    platform, _ = pick_devices(part.args.device)
    devices = jax.local_devices(backend=platform.name)
    found, failed = [], []
    for check in checks(platform, len(devices)):
        print(check_line(check), file=sys.stderr, flush=True)
        error = None if check.error is None or math.isnan(check.error) else check.error
        passed = None if check.error is None else check.passed
        found.append(dataclasses.asdict(check) | {"error": error, "passed": passed})
        failed += [] if check.passed else [check.name]
        part.tell(platform=platform.name, devices=[each.device_kind for each in devices], checks=found)
    if failed:
        raise PartFailed(f"failed: {', '.join(failed)}")


def reference_part(part: Part) -> None:
    """Make the tokens that `exactness` compares with, on one CPU device, with attention in plain XLA."""
    part.tell(answers=msgspec.to_builtins(greedy_answers("cpu", 1, "native")))


def exactness_part(part: Part) -> None:
    """Compare the greedy tokens of a small model on the devices with those of the reference."""
    args = part.args
    try:
        told = json.loads((part.folder / "reference.json").read_text(encoding="utf-8"))
        reference = msgspec.convert(told["answers"], list[GreedyAnswer])
    except (OSError, KeyError) as error:
        raise PartFailed("the part `reference` gave no tokens to compare with") from error
    comparison = compare(reference, greedy_answers(args.device, args.tp_size or 1, args.attention_backend))
    part.tell(**dataclasses.asdict(comparison))
    if not comparison.passed:
        raise PartFailed(f"{comparison.equal} of {comparison.tokens} tokens are equal, and the rest is no tie")


def steps_part(part: Part) -> None:
    """Measure a full step in each bucket beside its least time, at the maker's rates where they are known."""
    args = alone_arguments(part.flags_with_model())
    start_log(args, ("disable_radix_cache", "disable_overlap_schedule", "max_queued_requests", "skip_server_warmup"))
    args = dataclasses.replace(args, skip_server_warmup=False, **one_batch.ALONE)  # every program is to be there
    target, model = target_here(args.device, args.num_devices), find_model(args)
    config = launch_of(args, held_on(target, args, model), target).runner_config
    context = context_for_all_rows(config, CONTEXT)
    plan = make_plan(args, model, target, context)  # measures the rates, while the memory is free
    rates = maker_rates(target.kind, target.num_devices, config.compute_dtype)
    about = {"model_path": args.model_path, "device_kind": target.kind, "num_devices": target.num_devices}
    about |= {"dtype": config.compute_dtype, "context": plan.context, "start_seconds": None}
    part.tell(**about, rates="maker's" if rates else "measured", steps=[])
    core = build_core(args)
    runner, steps = core.runner, []
    assert isinstance(runner, ModelRunner)
    part.tell(start_seconds=core.info.start_seconds, programs=core.info.programs)
    for step in measured_steps(runner, plan, rates, RUNS):
        print(f"{step.program}: {step.median_seconds:.5f} s", file=sys.stderr, flush=True)
        steps.append(step.as_json())
        part.tell(steps=steps)
    part.tell(compiles_after_ready=runner.compiles_after_ready)
    core.close()


def one_batch_part(part: Part) -> None:
    """Run bench_one_batch, whose own lines of JSON are the findings."""
    flags = part.flags_with_model()
    platform, _ = pick_devices(alone_arguments(flags).device)
    sizes, input_len, output_len = BATCHES.get(platform.name, BATCHES["other"])
    shape = ["--batch-size", *map(str, sizes), "--input-len", str(input_len), "--output-len", str(output_len)]
    args, rest = parse("bench_one_batch", [*shape, "--result-filename", str(part.folder / "one_batch.jsonl"), *flags])
    if code := one_batch.main(args, rest):
        raise PartFailed(f"bench_one_batch ended with exit code {code}")


PARTS = {
    "environment": environment_part,
    "selftest": selftest_part,
    "reference": reference_part,
    "exactness": exactness_part,
    "steps": steps_part,
    "one_batch": one_batch_part,
}


def main(part: Part) -> int:
    """Run the part. Returns the exit code: 0, or 1 when it failed."""
    try:
        PARTS[part.name](part)
    except PartFailed as error:
        part.tell(error=str(error))
    except Exception as error:
        part.tell(error=f"{type(error).__name__}: {error}")
        raise
    return 1 if "error" in part.found else 0


if __name__ == "__main__":
    name, folder, limit_s, model, *flags = sys.argv[1:]
    sys.exit(main(Part(name, Path(folder), float(limit_s), model, flags)))
