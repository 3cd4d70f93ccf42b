"""Step program of a model of a given depth, with scanned layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from sgl_jax.engine.launch_plan import plan_launch
from sgl_jax.models.families import decoder_config
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.launch_programs import launch_programs
from sgl_jax.runtime.compiler import Program
from sgl_jax.runtime.platform import PLATFORMS, kernels_for
from sgl_jax.settings.server_args import ServerArgs

DEPTHS = (4, 48)
_ARGS = {"dtype": "float32", "max_running_requests": 8, "chunked_prefill_size": 8, "max_total_tokens": 1024}


def at_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the model's config.json with another number of layers; its lists of one entry per layer are repeated."""
    changed = config | {"num_hidden_layers": layers}
    if types := config.get("layer_types"):
        changed["layer_types"] = (types * math.ceil(layers / len(types)))[:layers]
    return changed


def step_program(config: dict[str, Any]) -> Program:
    """Return the largest step program of a launch on one CPU device, with abstract weights."""
    platform = dataclasses.replace(PLATFORMS["cpu"], stacks_layers=True, vectorises_rows=True)
    model, args = decoder_config(config), ServerArgs(model_path="a config", device="cpu", **_ARGS)
    kernels = kernels_for(args.attention_backend, platform, model)
    launch = plan_launch(args, model, platform, kernels, stored_dtype=None, device_kind="cpu", device_bytes=1 << 33)
    placement = Placement.over(jax.devices("cpu")[:1], launch.grid)
    programs = launch_programs(model, launch, platform, kernels, placement)
    return [program for program in programs if program.name.startswith("tokens=")][-1]
