"""Report the memory and communication of models on several TPUs, without a TPU: bytes per device, and the collectives of
the compiled decode step.

    python benchmarks/grids.py --output benchmarks/grids.json --report benchmarks/grids.md [--only MODEL:TOPOLOGY]

Sizes and least times are those of `python -m sgl_jax.compile --plan`. Collectives are read from programs that libtpu
compiled with two and with four layers of the model: each layer adds the same. Needs libtpu, no TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.fit import Misfit, Plan, make_plan
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.planning.model import PlannedModel, find_model
from sgl_jax.planning.plan_report import as_data
from sgl_jax.planning.target import find_target
from sgl_jax.runtime.compiler import CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.settings.server_args import ServerArgs

DEPTHS = (2, 4)
CONTEXT = 1024
# Tensor parallelism up to the number of KV heads, then data ranks; experts are whole where there are enough of them.
DENSE = {
    "v6e-4": {"tp_size": 4},
    "v6e-8": {"tp_size": 8},
    "v6e-16": {"tp_size": 8, "dp_size": 2},
    "v7x-8": {"tp_size": 8, "dp_size": 2},
}
GRIDS: dict[str, dict[str, dict[str, int]]] = {
    "Qwen3-8B": DENSE,
    "Qwen3-32B": DENSE,
    "Qwen3-30B-A3B": {
        "v6e-4": {"tp_size": 4, "ep_size": 4},
        "v6e-8": {"tp_size": 4, "dp_size": 2, "ep_size": 8},
        "v6e-16": {"tp_size": 4, "dp_size": 4, "ep_size": 16},
        "v7x-8": {"tp_size": 4, "dp_size": 4, "ep_size": 16},
    },
    "Llama-3.3-70B": DENSE,
    "Grok-2": {topology: sizes | {"ep_size": min(8, sizes["tp_size"])} for topology, sizes in DENSE.items()},
}


def cell(name: str, topology: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return a line of the table. What was read from compiled programs before is kept."""
    args = ServerArgs(model_path=name, **GRIDS[name][topology])
    model, target = find_model(args), find_target(topology, args.tp_size, args.dp_size)
    try:
        plan = make_plan(args, model, target, CONTEXT)
    except Misfit as misfit:
        return {"model": name, "topology": topology, "misfit": str(misfit).splitlines()[0]}
    step = max((step for step in plan.steps if step.bucket.decodes), key=lambda step: step.num_tokens)
    if before is not None and before.get("rows") == step.num_tokens:
        found = before["collective_bytes"]
    else:
        few, more = (collectives(plan, model, step.bucket.num_tokens, depth) for depth in DEPTHS)
        layers = model.config.num_layers
        per_layer = {kind: (more[kind] - few[kind]) / (DEPTHS[1] - DEPTHS[0]) for kind in more}
        found = {kind: few[kind] + per_layer[kind] * (layers - DEPTHS[0]) for kind in more}
        print(name, topology, "compiled", flush=True)
    data = as_data(plan, None, None)
    return {
        key: data[key] for key in ("model", "topology", "grid", "num_devices", "weight_bytes", "kv_bytes", "kv_tokens")
    } | {
        "model": name,
        "rows": step.num_tokens,
        "collective_bytes": found,
        "least_collective_bytes": least_bytes(plan, step.bucket.num_tokens),
        "step": next(each for each in data["steps"] if each["tokens"] == step.bucket.num_tokens),
    }


def collectives(plan: Plan, model: PlannedModel, tokens: int, depth: int) -> Counter[str]:
    """Return the result bytes of the collectives of a step, by kind, for a model with this many layers."""
    config = model.config
    cut = {"num_layers": depth} | {
        field: kept[:depth]
        for field in ("moe_layers", "sliding_windows")
        if (kept := getattr(config, field)) is not None
    }
    config = dataclasses.replace(config, **cut)
    runner = plan.launch.runner_config
    pools = tuple(dataclasses.replace(pool, num_layers=depth) for pool in runner.pools)
    runner = dataclasses.replace(runner, pools=pools)
    launch, platform = dataclasses.replace(plan.launch, runner_config=runner), plan.target.platform
    placement = Placement.over(plan.target.find_devices(), launch.grid)
    programs = launch_programs(config, launch, platform, kernels_for(None, platform, config), placement)
    program = next(each for each in programs if each.name.startswith(f"tokens={tokens} "))
    with jax.default_matmul_precision(matmul_precision(launch.runner_config.compute_dtype)):
        calls = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)
    found: Counter[str] = Counter()
    for each in hlo.read(calls[program.name].as_text()).collectives():
        if not each.in_branch:
            found[each.collective or ""] += each.arrays[-1].nbytes
    return found


def least_bytes(plan: Plan, tokens: int) -> dict[str, int]:
    """Compute the bytes of activations: a sum after attention, and around the MLP the exchange between ranks and a sum in each."""
    grid, config = plan.launch.grid, plan.model.config
    rows, layers = tokens * config.hidden_size * 2, config.num_layers
    least = {"all-reduce": (2 * layers + 1) * rows if grid.tensor > 1 else 0}
    if grid.data > 1:
        least |= {"reduce-scatter": (layers + 1) * rows, "all-gather": (layers + 1) * rows * grid.data}
    return least


def report(found: list[dict[str, Any]], versions: dict[str, str]) -> str:
    lines = [
        "# Models on several TPUs",
        "",
        f"Made by `python benchmarks/grids.py` with jax {versions['jax']} and libtpu {versions['libtpu']}; nothing here ran on a TPU.",
        "Bytes are of one device. A decode step has the rows of the fullest launch, over all ranks, with",
        f"{CONTEXT} tokens each. Collectives: bytes of their results in the compiled step, beside the least there can be",
        "(activations only). Least ms: each weight and each row's KV read once, at the chip's full rate, or the links' time. In turn:",
        "the collectives, with 1 µs a hop, after everything else, as these programs run them; tokens/s are by this time.",
        "",
        "| model | topology | flags | weights GB | KV GB | tokens of KV | rows | collectives MB | least MB | least ms | limit | in turn ms | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        if "misfit" in each:
            lines.append(
                f"| {each['model']} | {each['topology']} | does not fit: {each['misfit'].partition(', and a page')[0]} |"
                + " |" * 10
            )
            continue
        grid, step = each["grid"], each["step"]
        flags = " ".join(f"{key[:1]}p {grid[key]}" for key in ("tensor", "data", "expert") if grid[key] > 1)
        sums = [sum(each[key].values()) / 1e6 for key in ("collective_bytes", "least_collective_bytes")]
        lines.append(
            f"| {each['model']} | {each['topology']} | {flags} | {each['weight_bytes'] / 1e9:.1f} | {each['kv_bytes'] / 1e9:.1f} "
            f"| {each['kv_tokens']:,} | {each['rows']} | {sums[0]:.1f} | {sums[1]:.1f} "
            f"| {step['least_seconds'] * 1e3:.2f} | {step['limit']} "
            f"| {step['in_turn_seconds'] * 1e3:.2f} | {step['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument(
        "--only", metavar="MODEL:TOPOLOGY", help="compile this cell anew; without it, those not there yet"
    )
    args = parser.parse_args()
    before = json.loads(args.output.read_text()) if args.output.exists() else {"cells": []}
    cells = {(each["model"], each["topology"]): each for each in before["cells"]}
    here = {package: version(package) for package in ("jax", "libtpu")}
    versions = before.get("versions", here)  # they compiled what is kept
    for name, grids in GRIDS.items():
        for topology in grids:
            known = None if args.only == f"{name}:{topology}" else cells.get((name, topology))
            cells[name, topology] = found = cell(name, topology, known)
            is_kept = known is not None and known.get("collective_bytes") == found.get("collective_bytes")
            versions = versions if is_kept else here
    order = [cells[name, topology] for name in GRIDS for topology in GRIDS[name]]
    args.output.write_text(json.dumps({"versions": versions, "cells": order}, indent=1) + "\n")
    args.report.write_text(report(order, versions))


if __name__ == "__main__":
    main()
