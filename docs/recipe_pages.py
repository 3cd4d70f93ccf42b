"""Writes docs/recipes/: for each model its launches, with the plan of each. `python docs/generate.py` calls it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from sgl_jax.planning.fit import make_plan
from sgl_jax.planning.model import find_model
from sgl_jax.planning.plan_report import as_data
from sgl_jax.planning.target import find_target
from sgl_jax.settings.server_args import ServerArgs

FOLDER = Path(__file__).with_name("recipes")
CONTEXT = 1024  # tokens of KV per row of a counted step


class Launch(NamedTuple):
    chips: str
    flags: str


# Models by the names of their bundled configs, with the hub's id and the launches.
RECIPES: dict[str, tuple[str, list[Launch]]] = {
    "Qwen3-0.6B": ("Qwen/Qwen3-0.6B", [Launch("v6e-1", "")]),
    "Qwen3-8B": ("Qwen/Qwen3-8B", [Launch("v6e-1", ""), Launch("v6e-4", "--tp-size 4")]),
    "Qwen3-14B": ("Qwen/Qwen3-14B", [Launch("v6e-4", "--tp-size 4")]),
    "Qwen3-32B": ("Qwen/Qwen3-32B", [Launch("v6e-4", "--tp-size 4"), Launch("v7x-4", "--tp-size 8")]),
    "Qwen3-30B-A3B": ("Qwen/Qwen3-30B-A3B", [Launch("v6e-8", "--tp-size 4 --dp-size 2 --ep-size 8")]),
    "Qwen3-Coder-30B-A3B": ("Qwen/Qwen3-Coder-30B-A3B-Instruct", [Launch("v6e-4", "--tp-size 4")]),
    "Llama-3.3-70B": (
        "meta-llama/Llama-3.3-70B-Instruct",
        [Launch("v6e-8", "--tp-size 8"), Launch("v7x-4", "--tp-size 8")],
    ),
    "GLM-4.5-Air": ("zai-org/GLM-4.5-Air", [Launch("v7x-4", "--tp-size 8")]),
    "Qwen3-235B-A22B": ("Qwen/Qwen3-235B-A22B", [Launch("v7x-4", "--tp-size 8")]),
    "DeepSeek-V3": ("deepseek-ai/DeepSeek-V3", [Launch("v7x-8", "--tp-size 16")]),
}

HEAD = """# {model}

<!-- Written by `python docs/generate.py` from docs/recipe_pages.py and the planner: change it there. -->

**All figures on this page are predicted.** The planner computes them from the model's config and the makers' figures for the chips;
no TPU has run these launches yet ([what is known](../features/tpu.md)). The weights are counted in bfloat16. "Least ms" is a bound: no step
can be faster. The commands make them anew, in seconds and without a TPU.
"""

SECTION = """
## {chips}

```
python -m sgl_jax.launch_server --model-path {hub}{flags}
```

| predicted, per device | |
|---|---|
| devices | {num_devices} x {device_kind}, {device_gib:.1f} GiB each |
| weights | {weight_gib:.1f} GiB |
| KV cache | {kv_gib:.1f} GiB: {kv_tokens:,} tokens in all, {full_contexts:,.1f} full contexts of {context_length:,} |
| running requests | {max_running_requests} at most |

| tokens | rows | step | least ms (predicted) | limit | in turn ms (predicted) | tokens/s at most (predicted) |
|---|---|---|---|---|---|---|
{steps}

Each row has {counted_context:,} tokens of KV. Made by

```
python -m sgl_jax.compile --topology {chips} --model-path {model} --plan{flags}
```
"""

TAIL = """
Other chips: [the table](../recipes.md). Flags that help beside these: [Useful beside them](../recipes.md#commands).
"""


def recipe_page(model: str) -> str:
    hub, launches = RECIPES[model]
    return HEAD.format(model=model) + "".join(_section(model, hub, each) for each in launches) + TAIL


def _section(model: str, hub: str, launch: Launch) -> str:
    args = ServerArgs.from_cli(["--model-path", f"config:{model}", *shlex.split(launch.flags)], {})
    plan = as_data(
        make_plan(args, find_model(args), find_target(launch.chips, args.tp_size, args.dp_size), CONTEXT), None, None
    )
    sizes = {f"{name}_gib": plan[f"{name}_bytes"] / 2**30 for name in ("device", "weight", "kv")}
    steps = "\n".join(_step(each) for each in plan["steps"])
    texts = {"model": model, "hub": hub, "chips": launch.chips, "flags": f" {launch.flags}".rstrip(), "steps": steps}
    return SECTION.format(**(plan | sizes | texts))


def _step(step: dict[str, Any]) -> str:
    least, in_turn = (f"{step[key] * 1e3:.2f}" for key in ("least_seconds", "in_turn_seconds"))
    kind, rate = step["kind"], f"{step['tokens_per_second']:,.0f}"
    return f"| {step['tokens']} | {step['rows']} | {kind} | {least} | {step['limit']} | {in_turn} | {rate} |"


def file_name(model: str) -> str:
    return f"{model.lower()}.md"


def write() -> None:
    """Write all pages, and delete those of models that are no longer there."""
    FOLDER.mkdir(exist_ok=True)
    for page in {*FOLDER.glob("*.md")} - {FOLDER / file_name(model) for model in RECIPES}:
        page.unlink()
    for model in RECIPES:
        (FOLDER / file_name(model)).write_text(recipe_page(model), encoding="utf-8")
        print(f"wrote docs/recipes/{file_name(model)}")
