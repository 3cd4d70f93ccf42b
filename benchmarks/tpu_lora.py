"""Report what adapters add to a step of Qwen3-8B on a TPU, as libtpu compiles it, without a TPU.

    python benchmarks/tpu_lora.py --output benchmarks/tpu_lora.json --report benchmarks/lora.md

Steps of two and of four layers are compiled; their difference is that of two layers, and the model has 36. Cycles are the compiler's
estimates of all instructions in plain XLA; attention kernels have none, and are the same with adapters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL, TOPOLOGY, SLOTS = "Qwen3-8B", "v6e-1", 8
RANKS, TOKENS, DEPTHS = (None, 16, 64), (8, 128, 2048), (2, 4)


def measure(rank: int | None, depth: int) -> dict[int, int]:
    """Return the cycles of a step of each number of tokens."""
    import jax

    from sgl_jax.parallel.placement import Placement
    from sgl_jax.planning import hlo
    from sgl_jax.planning.fit import make_plan
    from sgl_jax.planning.launch_programs import launch_programs
    from sgl_jax.planning.model import find_model
    from sgl_jax.planning.target import find_target
    from sgl_jax.runtime.compiler import CompileWatch, compile_all
    from sgl_jax.runtime.platform import kernels_for
    from sgl_jax.runtime.programs import step_name
    from sgl_jax.settings.server_args import ServerArgs

    lora: dict[str, Any] = {"enable_lora": True, "max_loras_per_batch": SLOTS, "max_lora_rank": rank} if rank else {}
    args = ServerArgs(model_path=MODEL, attention_backend="fa", **lora)
    model = find_model(args)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=depth))
    target = find_target(TOPOLOGY)
    plan = make_plan(args, model, target, 1024)
    placement = Placement.over(target.find_devices(), plan.launch.grid)
    kernels = kernels_for("fa", target.platform, plan.model.config)
    names = {step_name(each.bucket): each.bucket.num_tokens for each in plan.steps if each.bucket.num_tokens in TOKENS}
    programs = launch_programs(plan.model.config, plan.launch, target.platform, kernels, placement)
    wanted = [each for each in programs if each.name in names]
    with jax.default_matmul_precision("default"):
        calls = compile_all(wanted, CompileWatch(), lambda *_: None, absent=placement.mesh)
    return {names[n]: sum(each.cycles for each in hlo.read(c.as_text()).instructions()) for n, c in calls.items()}


def slot_bytes(rank: int) -> tuple[int, int]:
    """Return the bytes of the slots, and of the weights beside them."""
    from sgl_jax.models.adapters import AdapterRoom, slot_bytes
    from sgl_jax.planning.model import find_model
    from sgl_jax.runtime.placed_weights import weight_bytes
    from sgl_jax.settings.server_args import ServerArgs

    config = find_model(ServerArgs(model_path=MODEL)).config
    room = AdapterRoom(SLOTS, rank, ("qkv", "o", "gate_up", "down"))
    return slot_bytes(config, room, "bfloat16"), weight_bytes(config, "bfloat16")


def report(data: dict[str, Any]) -> str:
    lines = [
        "# What adapters add to a step",
        "",
        f"{MODEL} on {TOPOLOGY}, {SLOTS} slots for all linear modules, bfloat16, as libtpu {data['libtpu']} compiles it; nothing ran on a chip. "
        "Thousand cycles of 36 layers and the head, without attention kernels, which are the same.",
        "",
        "| tokens | without adapters | rank 16 | rank 64 |",
        "|---|---|---|---|",
    ]
    for tokens in TOKENS:
        base, *others = (data["cycles"][str(rank)][str(tokens)] for rank in RANKS)
        shown = (f"{each / 1e3:,.0f} ({each / base - 1:+.1%})" for each in others)
        lines.append(f"| {tokens} | {base / 1e3:,.0f} | {' | '.join(shown)} |")
    shown = (f"{data['bytes'][str(rank)]:.1%}" for rank in RANKS if rank)
    lines += [f"| bytes beside the weights | 0 | {' | '.join(shown)} |", ""]
    lines += [
        "A launch without adapters has the programs that it had: their arguments and instructions are the same.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    cycles: dict[str, dict[str, int]] = {}
    for rank in RANKS:
        two, four = (measure(rank, depth) for depth in DEPTHS)
        cycles[str(rank)] = {str(tokens): two[tokens] + 17 * (four[tokens] - two[tokens]) for tokens in TOKENS}
        print(rank, cycles[str(rank)], flush=True)
    shares = {str(rank): slots / weights for rank in RANKS if rank for slots, weights in [slot_bytes(rank)]}
    data = {"libtpu": version("libtpu"), "cycles": cycles, "bytes": shares}
    args.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    args.report.write_text(report(data), encoding="utf-8")


if __name__ == "__main__":
    main()
