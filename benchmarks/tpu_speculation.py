"""Report the cycles of decode steps with and without an EAGLE-3 head, as libtpu estimates them, without a TPU.

    python benchmarks/tpu_speculation.py --output benchmarks/tpu_speculation.json [--rows 8]

Each launch has the flags in the table of docs/features/speculative_decoding.md, all layers, and a head of one layer as wide as
the target's. Estimates leave out attention kernels, links between chips and waits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sgl_jax.parallel.placement import Placement
from sgl_jax.planning import hlo
from sgl_jax.planning.fit import Plan, make_plan
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.planning.model import find_model
from sgl_jax.planning.target import find_target
from sgl_jax.planning.topology import set_tpu_environment
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.runtime.programs import step_name
from sgl_jax.settings.server_args import ServerArgs

LAUNCHES = (("Qwen3-8B", "v6e-1"), ("Llama-3.1-8B", "v6e-4"), ("Qwen3-32B", "v6e-4"))
LENGTHS = (1.5, 2.0, 2.5, 3.0)  # tokens that a row gains in a step, on average
WIDTH, DRAFT_VOCABULARY = 4, 32000
FLAGS: dict[str, Any] = {
    "attention_backend": "fa",
    "page_size": 64,
    "mem_fraction_static": 0.8,
    "max_prefill_tokens": 4096,
    "speculative_algorithm": "EAGLE3",
    "speculative_num_steps": WIDTH - 1,
}


def write_head(name: str, folder: Path) -> None:
    """Write the config.json of a head for the model, in AngelSlim's layout."""
    target = find_model(ServerArgs(model_path=name)).config
    config = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "intermediate_size": target.intermediate_size,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": DRAFT_VOCABULARY,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cycles(plan: Plan, bucket: Bucket) -> int:
    """Return the compiler's estimate of a step that takes no branch. Its one loop is that of the draft passes."""
    launch, platform, config = plan.launch, plan.target.platform, plan.model.config
    placement = Placement.over(plan.target.find_devices(), launch.grid)
    made = launch_programs(config, launch, platform, kernels_for("fa", platform, config), placement)
    program = next(each for each in made if each.name == step_name(bucket))
    with jax.default_matmul_precision(matmul_precision(launch.runner_config.compute_dtype)):
        calls = compile_all([program], CompileWatch(), lambda *report: None, absent=placement.mesh)
    found = [each for each in hlo.read(calls[program.name].as_text()).instructions() if not each.in_branch]
    return sum(each.cycles * (bucket.width - 1 if each.in_loop else 1) for each in found)


def measure(name: str, topology: str, rows: int) -> dict[str, Any]:
    target = find_target(topology)
    with tempfile.TemporaryDirectory() as folder:
        write_head(name, Path(folder))
        args = ServerArgs(model_path=name, speculative_draft_model_path=folder, **FLAGS)
        plan = make_plan(args, find_model(args), target, 1024)
    plain = {flag: value for flag, value in FLAGS.items() if not flag.startswith("speculative")}
    without = ServerArgs(model_path=name, **plain)
    off = cycles(make_plan(without, find_model(without), target, 1024), Bucket(rows, rows))
    on = cycles(plan, Bucket(rows * WIDTH, rows, WIDTH))
    return {"model": name, "topology": topology, "rows": rows, "off": off, "on": on}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8, help="of a bucket that both launches have: 8, 32 or 128")
    args = parser.parse_args()
    set_tpu_environment()
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(args.output.read_text())["steps"] if args.output.exists() else []
    found = [each for each in found if each["rows"] != args.rows]
    for name, topology in LAUNCHES:
        found.append(measure(name, topology, args.rows))
        each = found[-1]
        speeds = (f"{length * each['off'] / each['on']:.2f}" for length in LENGTHS)
        millions = (f"{each[key] / 1e6:.1f}" for key in ("off", "on"))
        print(f"| {name} | {topology} | {args.rows} |", " | ".join([*millions, *speeds]), "|", flush=True)
        versions = {package: version(package) for package in ("jax", "libtpu")}
        args.output.write_text(json.dumps({"versions": versions, "steps": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
