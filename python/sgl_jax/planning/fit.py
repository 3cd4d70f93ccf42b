"""Plan of a launch: whether it fits, how much KV remains, and the cost of each step. Arithmetic alone, in seconds."""

import dataclasses
from typing import Any

from sgl_jax.engine.launch_plan import LaunchPlan, plan_launch
from sgl_jax.engine.quantisation import held
from sgl_jax.models.weights import parameters
from sgl_jax.planning.cost import Bound, StepCost, step_cost
from sgl_jax.planning.model import PlannedModel
from sgl_jax.planning.target import Target, find_target
from sgl_jax.planning.topology import larger
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.memory import DoesNotFit
from sgl_jax.runtime.platform import kernels_for
from sgl_jax.settings.server_args import ServerArgs

_FEW_REQUESTS = 8
_MOST_MEMORY = 0.97  # fraction of a device for weights and KV; programs and their temporaries need the rest


class Misfit(ValueError):
    """The launch does not fit its devices. The message has the reason in its first line, then what would help."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    bucket: Bucket  # for each data rank
    num_tokens: int  # on all of them
    cost: StepCost
    bound: Bound | None  # None: the device's rates are unknown

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second: by the time in turn, or by the least time of a step in parts, which overlaps."""
        if self.bound is None:
            return None
        return self.num_tokens / (self.bound.in_turn_s if self.bucket.num_parts == 1 else self.bound.seconds)


@dataclasses.dataclass(frozen=True)
class Plan:
    model: PlannedModel
    target: Target
    launch: LaunchPlan
    parameters: int
    context: int  # tokens of each row in the cache when steps are counted
    steps: tuple[PlannedStep, ...]

    @property
    def full_contexts(self) -> float:
        return self.launch.kv_tokens / self.launch.runner_config.context_length


def make_plan(args: ServerArgs, model: PlannedModel, target: Target, context: int) -> Plan:
    """Plan a launch and count its steps with `context` cached tokens per row. Raises Misfit, or ValueError for a flag."""
    args = dataclasses.replace(args, tp_size=target.num_devices // args.dp_size)
    model = held_on(target, args, model)
    launch = launch_of(args, model, target)
    config = launch.runner_config
    context = min(context, config.context_length)
    rates = target.rates(config.compute_dtype)
    dtypes = {"weight_dtype": config.weight_dtype, "compute_dtype": config.compute_dtype}
    steps = []
    for bucket in config.buckets:
        cost = step_cost(model.config, launch.grid, config.pools[0], bucket, context, **dtypes)
        bound = cost.bound(rates) if rates else None
        steps.append(PlannedStep(bucket, bucket.num_tokens * launch.grid.data, cost, bound))
    return Plan(model, target, launch, parameters(model.config), context, tuple(steps))


def held_on(target: Target, args: ServerArgs, model: PlannedModel) -> PlannedModel:
    """Return the model with its matrices held as on the target's devices. Raises ValueError for a flag."""
    return dataclasses.replace(model, config=held(args, model.config, target.platform, target.kind))


def launch_of(args: ServerArgs, model: PlannedModel, target: Target) -> LaunchPlan:
    """Decide a launch's sizes as the server would. Raises Misfit, or ValueError for a flag."""
    try:
        return _launch(args, model, target)
    except DoesNotFit as error:
        raise Misfit("\n".join([str(error), *what_would_fit(args, model, target)])) from error


def what_would_fit(args: ServerArgs, model: PlannedModel, target: Target) -> list[str]:
    """Return a line for each single change that would make the launch fit, with the KV it then has."""
    few = -(-_FEW_REQUESTS // args.dp_size) * args.dp_size
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"--mem-fraction-static {_MOST_MEMORY}", {"mem_fraction_static": _MOST_MEMORY}),
        (f"--max-running-requests {few}", {"max_running_requests": few}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("leaving out --max-total-tokens", {"max_total_tokens": None}),
    ]
    lines = []
    for text, change in changes:
        if (found := _tried(dataclasses.replace(args, **change), model, target)) is None:
            continue
        least = f" ({_least_fraction(args, model, target):.2f} is the least)" if "mem_fraction_static" in change else ""
        lines.append(f"{text} would fit, with {_room(found)}{least}")
    for topology in larger(target.topology) if target.topology else ():
        more = find_target(topology.name)
        tp_size = more.num_devices // args.dp_size
        if found := _tried(dataclasses.replace(args, tp_size=tp_size), model, more):
            chips = f"{topology.name} ({topology.num_chips} chips, {found.grid.flags})"
            lines.append(f"{chips} would fit, with {_room(found)}")
            break
    return lines or ["nothing that was tried makes it fit: more memory, fewer running requests, more chips of its kind"]


def _launch(args: ServerArgs, model: PlannedModel, target: Target) -> LaunchPlan:
    platform, config = target.platform, model.config
    kernels = kernels_for(args.attention_backend, platform, config)
    sizes = {"stored_dtype": model.stored_dtype, "device_bytes": target.device_bytes, "adapters": model.adapters}
    return plan_launch(args, config, platform, kernels, device_kind=target.kind, **sizes)


def _tried(args: ServerArgs, model: PlannedModel, target: Target) -> LaunchPlan | None:
    try:
        return _launch(args, model, target)
    except ValueError:
        return None


def _least_fraction(args: ServerArgs, model: PlannedModel, target: Target) -> float:
    """Return the least --mem-fraction-static that fits, in steps of 0.01."""
    for percent in range(1, round(100 * _MOST_MEMORY)):
        if _tried(dataclasses.replace(args, mem_fraction_static=percent / 100), model, target):
            return percent / 100
    return _MOST_MEMORY


def _room(launch: LaunchPlan) -> str:
    return f"{launch.kv_tokens:,} tokens of KV"
