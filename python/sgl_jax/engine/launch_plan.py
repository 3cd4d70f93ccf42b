"""Decisions of a launch before any weight is read: sizes, limits and buckets, from the flags, the model and a device's
memory. `sgl_jax.compile` makes the same decisions for devices that this host does not have."""

import dataclasses

import numpy as np

from sgl_jax.engine.speculation_plan import SpeculationPlan, drafter_of, plan_speculation
from sgl_jax.models.adapters import AdapterRoom, slot_bytes
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.grid import Grid
from sgl_jax.request import MAX_EOS_TOKENS
from sgl_jax.runtime.buckets import Bucket, divided, make_buckets
from sgl_jax.runtime.memory import MemoryPlan, plan_memory
from sgl_jax.runtime.placed_weights import weight_bytes
from sgl_jax.runtime.platform import Platform, overlap_tokens
from sgl_jax.runtime.pool import Pool, pools_of
from sgl_jax.runtime.programs import RunnerConfig
from sgl_jax.runtime.step_spec import Drafter
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.settings.server_args import ServerArgs


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """Sizes and limits of an engine."""

    grid: Grid
    weight_bytes: int  # on each device
    memory: MemoryPlan  # each device's
    runner_config: RunnerConfig
    scheduler_config: SchedulerConfig
    drafter: Drafter | None = None  # makes drafts inside the step
    adapter_bytes: int = 0  # taken by the adapters' slots on each device

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights and of the adapters' slots, on each device."""
        return self.weight_bytes + self.adapter_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that requests can use, on all data ranks together."""
        return self.memory.num_tokens * self.grid.data


def plan_launch(
    args: ServerArgs,
    model: DecoderConfig,
    platform: Platform,
    kernels: Kernels,
    *,
    stored_dtype: str | None,
    device_kind: str,
    device_bytes: int,
    adapters: AdapterRoom | None = None,
) -> LaunchPlan:
    """Decide a launch; `stored_dtype` is the checkpoint's, and `adapters` the slots that it needs room for. Raises ValueError for a flag that cannot be honoured."""
    grid = grid_of(args)
    _check_model(args, model, grid)
    shard = model.shard(grid)  # the shard of each device
    dtype = _dtype(args, stored_dtype, platform)
    weights, pools = weight_bytes(shard, dtype), pools_of(shard, kernels.attention, dtype)
    max_running = -(-(args.max_running_requests or platform.max_running_requests) // grid.data)  # on each data rank
    speculation = plan_speculation(args.speculation, model, platform, grid.data)
    wanted = RunnerConfig(
        compute_dtype=dtype,
        weight_dtype=dtype,
        pools=pools,
        page_size=_page_size(args, platform, kernels, pools[0]),
        num_pages=0,
        num_rows=max_running * grid.data,
        context_length=args.context_length or model.context_length,
        buckets=(),
        num_ranks=grid.data,
        width=speculation.width,
        lookahead=speculation.lookahead,
        keeps_tokens=speculation.keeps_tokens,
        takes_grammars=args.grammar_backend != "none" and model.pooling is None,
        adapters=adapters,
        simulated_acceptance=args.speculative_simulated_acceptance,
    )
    adapter_bytes = slot_bytes(shard, adapters, dtype)
    memory = plan_memory(
        platform,
        total_bytes=device_bytes,
        weight_bytes=weights,
        state_bytes=wanted.state_sizes(shard).nbytes + adapter_bytes,
        bytes_per_token=sum(pool.bytes_per_token for pool in pools),
        page_size=wanted.page_size,
        context_length=wanted.context_length + wanted.overrun,
        num_rows=max_running,
        mem_fraction=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
        num_ranks=grid.data,
    )
    _check_pool(args, memory, wanted, grid)
    runner, scheduler = _limits(args, platform, wanted, memory, speculation, grid)
    if grid.tensor > 1:
        part_tokens = overlap_tokens(device_kind, model, grid)
        runner = dataclasses.replace(runner, buckets=_divided(args, runner.buckets, part_tokens, grid))
    return LaunchPlan(grid, weights, memory, runner, scheduler, drafter_of(args.speculation), adapter_bytes)


def _limits(
    args: ServerArgs,
    platform: Platform,
    wanted: RunnerConfig,
    memory: MemoryPlan,
    speculation: SpeculationPlan,
    grid: Grid,
) -> tuple[RunnerConfig, SchedulerConfig]:
    """Return what is wanted within the memory, with the buckets of its steps."""
    width, page_limit = speculation.width, memory.num_pages - 1
    context_length = min(wanted.context_length, memory.num_tokens - wanted.overrun)
    max_running = min(wanted.num_rows // grid.data, page_limit)
    wide_rows = min(speculation.max_rows, max_running)
    prefill_tokens = _prefill_tokens(args, platform, context_length, grid.data)
    step_tokens = max(prefill_tokens, max_running, wide_rows * width)  # room for the tokens of every running request
    multiple = grid.tensor if grid.sequence else 1  # each device computes as many of a step's tokens
    smallest, growth = platform.smallest_bucket[wanted.compute_dtype], platform.bucket_growth
    buckets = make_buckets(step_tokens, max_running, smallest, multiple, growth=growth)
    if width > 1:
        buckets += make_buckets(step_tokens, wide_rows, max(1, smallest // width), multiple, width=width)
    runner = dataclasses.replace(
        wanted,
        num_pages=memory.num_pages,
        num_rows=max_running * grid.data,
        context_length=context_length,
        buckets=buckets,
    )
    scheduler = SchedulerConfig(
        max_running,
        context_length,
        step_tokens,
        prefill_tokens,
        args.schedule_policy,
        args.dp_schedule_policy,
        width,
        wide_rows,
        speculation.draft_cost,
        speculation.lookahead,
        speculation.keeps_tokens,
    )
    return runner, scheduler


def _divided(args: ServerArgs, buckets: tuple[Bucket, ...], by_default: int, grid: Grid) -> tuple[Bucket, ...]:
    """Return the buckets, in two parts where each has --collective-overlap-tokens, else as many as for the device and the model."""
    asked = args.collective_overlap_tokens
    found = tuple(divided(bucket, by_default if asked is None else asked, grid.tensor) for bucket in buckets)
    if asked and all(bucket.num_parts == 1 for bucket in found):
        largest = max(buckets, key=lambda bucket: bucket.num_tokens)
        raise ValueError(
            f"--collective-overlap-tokens is {asked}; the largest step has {largest.num_tokens} tokens and {largest.num_rows} rows on "
            "each data rank, and no two equal parts of so many tokens, with all rows in the first; lower it, or raise "
            "--chunked-prefill-size"
        )
    return found


def _page_size(args: ServerArgs, platform: Platform, kernels: Kernels, pool: Pool) -> int:
    """Return tokens per page: --page-size, else the backend's or the platform's, as a multiple of the backend's."""
    multiple = kernels.attention.page_multiple(np.dtype(pool.dtype))
    wanted = args.page_size or kernels.attention.page_size or platform.page_size
    return -(-wanted // multiple) * multiple


def _check_model(args: ServerArgs, model: DecoderConfig, grid: Grid) -> None:
    if (count := len(model.eos_token_ids)) > MAX_EOS_TOKENS:
        raise ValueError(f"the model has {count} end-of-sequence tokens; at most {MAX_EOS_TOKENS} fit")
    if (length := args.context_length) is not None and length > model.context_length:
        most = model.context_length
        raise ValueError(f"--context-length is {length}; the model was made for {most} tokens at most")
    if (rows := args.max_running_requests or 0) % grid.data:
        raise ValueError(f"--max-running-requests is {rows}; it must be a multiple of --dp-size {grid.data}")


def _check_pool(args: ServerArgs, memory: MemoryPlan, runner: RunnerConfig, grid: Grid) -> None:
    of_each = " on each data rank" if grid.data > 1 else ""
    pool = f"the KV pool of {memory.num_tokens} tokens{of_each} in pages of {runner.page_size}"
    room = memory.num_tokens - runner.overrun
    if room < 2:
        drafts = f"--speculative-num-draft-tokens is {runner.width}; drafts take {runner.overrun} tokens beyond a request's own"
        raise ValueError(f"{drafts}, and {pool} has no room for more; lower it, or raise --max-total-tokens")
    for flag, value, most in (
        ("--context-length", args.context_length, room),
        ("--max-running-requests", args.max_running_requests, (memory.num_pages - 1) * grid.data),
    ):
        if value is not None and value > most:
            cure = "lower it, or raise --max-total-tokens or --mem-fraction-static"
            raise ValueError(f"{flag} is {value}; {pool} allows {most}; {cure}")


def _dtype(args: ServerArgs, stored: str | None, platform: Platform) -> str:
    """Return --dtype; for auto float32 if the weights are stored in float32, else the platform's dtype."""
    if args.dtype != "auto":
        return args.dtype
    return "float32" if stored == "float32" else platform.dtype


def grid_of(args: ServerArgs) -> Grid:
    return Grid(args.tp_size or 1, args.dp_size, args.ep_size, args.enable_sequence_parallel)


def _prefill_tokens(args: ServerArgs, platform: Platform, context_length: int, num_ranks: int) -> int:
    """Return the most prompt tokens, of one prompt or several, that a data rank computes in a step."""
    chunk = args.chunked_prefill_size or platform.chunked_prefill_size
    if chunk == -1:
        chunk = args.max_prefill_tokens
    return min(-(-min(chunk, args.max_prefill_tokens) // num_ranks), context_length)
