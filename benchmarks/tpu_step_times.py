"""Estimate the time of TPU steps by stage from programs that libtpu compiled, without a TPU.

    python benchmarks/tpu_step_times.py --output benchmarks/tpu_step_times.json --report benchmarks/tpu_step_times.md \\
        [--only MODEL:TOPOLOGY:TOKENS] [--one-part]

A step is one of the default launch over all chips: 16 or 256 decoding rows, or 2048 prompt tokens, of 1024 cached tokens each.
planning/step_time.py says what is counted. With `--one-part` no step is divided (--collective-overlap-tokens 0); these have lines
of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.fit import Misfit, Plan, make_plan
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.planning.model import find_model
from sgl_jax.planning.step_time import step_time
from sgl_jax.planning.target import find_target
from sgl_jax.planning.topology import set_tpu_environment
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

MODELS = ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B", "Gemma-2-9B", "Qwen3-30B-A3B")
TOPOLOGIES = ("v6e-1", "v6e-4", "v7x-4")
TOKENS = (16, 256, 2048)
CONTEXT = 1024
HEAD = """# Estimated times of TPU steps

Made by `python benchmarks/tpu_step_times.py`; nothing here ran on a TPU. Versions of jax and libtpu are in the JSON.

A step of the default launch over all chips, of full rows with {context} cached tokens, in milliseconds. Products and other
operations are what the compiler estimates for each instruction; gathers on SparseCores, for which it estimates nothing, take
their bytes at the memory's full rate. Own kernels: products and norms of long steps and products of experts, by the longer of what
they read and write at the full rate and multiply at nine tenths of the matrix rate. Exchange is the time of all collectives by the
links' full rate and 1 µs a hop; wait is the part of it beside which the program runs nothing. Sum: products, others, own kernels
and wait. Attention kernels and sorts (one or two for each layer of experts) are left out, launches of all kernels are counted, and
the sampler's branches, which steps without sampling skip, are apart. Bound: the longest of reading
weights and KV, of products, and of links, at full rates; in turn: links after the others. Rate: the model's products at the
matrix rate, over the sum.

| model | topology | step | parts | products | others | own kernels | exchange | wait | sum | launches | sampler | bound | in turn | rate | temporaries MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def cell(
    name: str, topology: str, tokens: int, overlap_tokens: int | None, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a line of the table. What was read from a compiled program before is kept; the plan is made anew."""
    args = ServerArgs(model_path=name, collective_overlap_tokens=overlap_tokens)
    model, target = find_model(args), find_target(topology)
    found: dict[str, Any] = {"model": name, "topology": topology, "tokens": tokens, "overlap_tokens": overlap_tokens}
    try:
        plan = make_plan(args, model, target, CONTEXT)
    except Misfit as misfit:
        return found | {"misfit": str(misfit).splitlines()[0]}
    step = next((each for each in plan.steps if each.bucket.num_tokens == tokens), None)
    if step is None or step.bound is None:
        return found | {"misfit": f"the launch has no step of {tokens} tokens"}
    return found | {
        "kind": "decode" if step.bucket.decodes else "prompt",
        "num_parts": step.bucket.num_parts,
        "bound": dataclasses.asdict(step.bound),
        "bound_seconds": step.bound.seconds,
        "in_turn_seconds": step.bound.in_turn_s,
        "compiled": estimate(plan, step.bucket) if before is None else before["compiled"],
    }


def estimate(plan: Plan, bucket: Bucket) -> dict[str, Any]:
    """Compile a step, and read its times and temporaries."""
    launch, target, config = plan.launch, plan.target, plan.model.config
    assert target.topology is not None
    placement = Placement.over(target.find_devices(), launch.grid)
    kernels = kernels_for(None, target.platform, config)
    programs = launch_programs(config, launch, target.platform, kernels, placement)
    program = next(each for each in programs if each.name == step_name(bucket))
    with jax.default_matmul_precision(matmul_precision(launch.runner_config.compute_dtype)):
        compiled = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)[program.name]
    memory: Any = compiled.memory_analysis()
    time = step_time(hlo.read(compiled.as_text() or ""), target.topology, target.num_devices)
    versions = {package: version(package) for package in ("jax", "libtpu")}
    return dataclasses.asdict(time) | {
        "seconds": time.seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "versions": versions,
    }


def report(cells: list[dict[str, Any]]) -> str:
    lines = []
    for each in cells:
        name = f"| {each['model']} | {each['topology']} | "
        if "misfit" in each:
            lines.append(f"{name}{each['tokens']} tokens: does not fit |" + " |" * 13)
            continue
        made = each["compiled"]
        times = [sum(made["products"].values()), sum(made["others"].values())]
        times += [made[key] for key in ("in_kernels", "exchanged", "waited")]
        sums = " | ".join(f"{1e3 * time:.2f}" for time in (*times, made["seconds"]))
        bounds = " | ".join(f"{1e3 * each[key]:.2f}" for key in ("bound_seconds", "in_turn_seconds"))
        rate = f"{each['bound']['compute_s'] / made['seconds']:.0%}"
        lines.append(
            f"{name}{each['kind']} {each['tokens']} | {each['num_parts']} | {sums} | {made['kernels']} "
            f"| {1e3 * made['sampling']:.2f} | {bounds} | {rate} | {made['temp_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument(
        "--only", metavar="MODEL:TOPOLOGY:TOKENS", nargs="+", help="these anew; without it, all missing"
    )
    parser.add_argument("--one-part", action="store_true", help="of steps that are divided otherwise")
    args = parser.parse_args()
    set_tpu_environment()
    order = [(m, t, n, o) for m in MODELS for t in TOPOLOGIES for n in TOKENS for o in (0, None)]
    before = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    keys = ("model", "topology", "tokens", "overlap_tokens")
    cells = {tuple(each[key] for key in keys): each for each in before}
    cells = {key: cell(*key, cells[key]) for key in order if key in cells}
    asked = [key for key in order if key[3] == (0 if args.one_part else None)]
    new = [key for key in asked if (":".join(map(str, key[:3])) in args.only if args.only else key not in cells)]
    for key in [None, *new]:
        if key is not None:
            cells[key] = cell(*key, None)
            print(key, "compiled", flush=True)
        found = [cells[key] for key in order if key in cells]
        args.output.write_text(json.dumps({"cells": found}, indent=1) + "\n")
        args.report.write_text(HEAD.format(context=CONTEXT) + report(found))


if __name__ == "__main__":
    main()
