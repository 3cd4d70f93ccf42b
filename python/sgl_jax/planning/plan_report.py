"""Reports of a plan and its programs: tables for people, and the same as plain data for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.box
from rich.table import Table

from sgl_jax.engine.launch_plan import LaunchPlan
from sgl_jax.observability.log import size
from sgl_jax.planning.fit import Plan, PlannedStep
from sgl_jax.planning.launch_programs import ProgramFacts
from sgl_jax.runtime.programs import step_name


def fit_table(plan: Plan) -> Table:
    launch, memory, limits = plan.launch, plan.launch.memory, plan.launch.runner_config
    target, config = plan.target, plan.model.config
    table = _table("", "")
    chips = f"{target.topology.num_chips} chips, " if target.topology else ""
    holds = f"{launch.kv_tokens:,} tokens: {plan.full_contexts:,.1f} full contexts of {limits.context_length:,}"
    for name, text in (
        ("model", f"{config.architecture}, {_count(plan.parameters)} parameters ({plan.model.source})"),
        ("devices", f"{target.name}: {chips}{target.num_devices} x {target.kind}, {size(target.device_bytes)} each"),
        ("launch", f"{launch.grid.flags}, {limits.compute_dtype}"),
        ("weights per device", f"{size(launch.weight_bytes)}, held as {config.weight_scheme or limits.weight_dtype}"),
        ("adapters per device", _adapters(launch)),
        ("KV per device", f"{size(memory.kv_bytes)} in {memory.num_pages:,} pages of {memory.page_size} tokens"),
        ("KV per token and device", f"{memory.bytes_per_token:,} bytes"),
        ("KV holds", holds),
        ("left per device", size(memory.total_bytes - launch.held_bytes - memory.kv_bytes)),
        ("running requests", f"{limits.num_rows} at most"),
    ):
        table.add_row(name, text)
    return table


def _adapters(launch: LaunchPlan) -> str:
    room = launch.runner_config.adapters
    return "none" if room is None else f"{size(launch.adapter_bytes)} in {room.number} slots of rank {room.rank}"


def step_table(plan: Plan) -> Table:
    """Make the table of the least time of a full step in each bucket, and the resource that limits it."""
    columns = "GFLOP", "memory MB", "reduced MB", "least ms", "limit", "in turn ms", "tokens/s"
    table = _table("tokens", "rows", "step", *columns)
    for step in plan.steps:
        wide = f", width {step.bucket.width}" if step.bucket.width > 1 else ""
        kind = f"{'decode' if step.bucket.decodes else 'prompt'}{wide}"
        cost = (f"{step.cost.flops / 1e9:,.0f}", _mb(step.cost.memory_bytes), _mb(step.cost.reduced_bytes))
        bound = ("?",) * 4
        if step.bound is not None:
            times = f"{step.bound.seconds * 1e3:.2f}", step.bound.limit, f"{step.bound.in_turn_s * 1e3:.2f}"
            bound = (*times, f"{step.tokens_per_s:,.0f}")
        table.add_row(str(step.bucket.num_tokens), str(step.bucket.num_rows), kind, *cost, *bound)
    table.caption = (
        f"Per device and step, with {plan.context:,} tokens per row. Least: each weight read once for each part of the step, "
        "each row's KV once, nothing else, at full rate. In turn: sums over devices come after everything else. tokens/s: by the time in turn; by the "
        "least time for a step in parts. Drafting is not counted."
    )
    return table


def program_table(facts: Sequence[ProgramFacts]) -> Table:
    table = _table("program", "seconds", "code MB", "temp MB", "in place MB", "collectives", "reduced MB", "cache")
    for each in facts:
        sizes = (_mb(each.code_bytes), _mb(each.temp_bytes), _mb(each.aliased_bytes))
        links = (str(each.collectives), _mb(each.reduced_bytes))
        table.add_row(each.name, f"{each.seconds:.1f}", *sizes, *links, "hit" if each.cache_hit else "miss")
    table.caption = f"Code of all programs: {size(sum(each.code_bytes for each in facts))} of each device's memory."
    return table


def overflow(plan: Plan, facts: Sequence[ProgramFacts]) -> str | None:
    """Say by how much weights, KV, code and the largest temporaries exceed a device, and the cure; None: they fit."""
    memory = plan.launch.memory
    programs = sum(each.code_bytes for each in facts) + max((each.temp_bytes for each in facts), default=0)
    surplus = plan.launch.held_bytes + memory.kv_bytes + programs - memory.total_bytes
    if surplus <= 0:
        return None
    fraction = (memory.budget_bytes - surplus) / memory.total_bytes
    return (
        f"programs need {size(programs)} beside weights and KV: {size(surplus)} more than a device has; "
        f"--mem-fraction-static {fraction:.2f} makes room"
    )


def as_data(plan: Plan, facts: Sequence[ProgramFacts] | None, seconds: float | None) -> dict[str, Any]:
    """Return the plan for JSON. `facts` None: nothing was compiled. Bytes and rates are per device, times in seconds."""
    launch, memory, limits, target = plan.launch, plan.launch.memory, plan.launch.runner_config, plan.target
    config = plan.model.config
    return {
        "model": plan.model.source,
        "architecture": config.architecture,
        "parameters": plan.parameters,
        "topology": target.name,
        "device_kind": target.kind,
        "num_chips": target.topology.num_chips if target.topology else None,
        "num_devices": target.num_devices,
        "grid": dataclasses.asdict(launch.grid),
        "dtype": limits.compute_dtype,
        "quantization": str(config.weight_scheme or ""),
        "device_bytes": memory.total_bytes,
        "weight_bytes": launch.weight_bytes,
        "adapter_bytes": launch.adapter_bytes,
        "kv_bytes": memory.kv_bytes,
        "kv_bytes_per_token": memory.bytes_per_token,
        "kv_tokens": launch.kv_tokens,
        "full_contexts": plan.full_contexts,
        "context_length": limits.context_length,
        "page_size": limits.page_size,
        "max_running_requests": limits.num_rows,
        "counted_context": plan.context,
        "steps": [_step_data(step) for step in plan.steps],
        "programs": [dataclasses.asdict(each) for each in facts] if facts is not None else None,
        "compile_seconds": seconds,
    }


def _step_data(step: PlannedStep) -> dict[str, Any]:
    data: dict[str, Any] = {
        "program": step_name(step.bucket),
        "tokens": step.bucket.num_tokens,
        "rows": step.bucket.num_rows,
        "width": step.bucket.width,
        "parts": step.bucket.num_parts,
        "kind": "decode" if step.bucket.decodes else "prompt",
        **dataclasses.asdict(step.cost),
    }
    if (bound := step.bound) is not None:
        seconds = {"compute_seconds": bound.compute_s, "memory_seconds": bound.memory_s, "links_seconds": bound.links_s}
        least = {"least_seconds": bound.seconds, "limit": bound.limit, "in_turn_seconds": bound.in_turn_s}
        data |= seconds | least | {"tokens_per_second": step.tokens_per_s}
    return data


def _table(*columns: str) -> Table:
    table = Table(box=rich.box.SIMPLE, show_header=any(columns), pad_edge=False, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or not column else "right", no_wrap=bool(index))
    return table


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
