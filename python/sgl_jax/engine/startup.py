"""Start-up of an engine: from server arguments to a core that is ready to step, with a log line for each stage."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

import jax

from sgl_jax import __version__
from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.adapter_loads import Adapters
from sgl_jax.engine.adapter_plan import adapter_store, plan_adapters
from sgl_jax.engine.core import Core
from sgl_jax.engine.grammar_compiles import Grammars, grammars_of
from sgl_jax.engine.hosts import Die, LeadingCore, lead, unite
from sgl_jax.engine.kv_cache import with_kv_scales
from sgl_jax.engine.launch_plan import LaunchPlan, grid_of, plan_launch
from sgl_jax.engine.loop import EngineCore, one_line
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.engine.pooler import Pooler
from sgl_jax.engine.pooling_plan import pooler_of
from sgl_jax.engine.quantisation import say_weights
from sgl_jax.engine.speculation_plan import draft_model_name
from sgl_jax.engine.trainer_calls import TrainerCalls
from sgl_jax.engine.weight_files import describe_model, other_weights, read_weights
from sgl_jax.models.checkpoint import CONFIG_FILES, Checkpoint, open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import Families, known_families
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import declare, parameters_per_token
from sgl_jax.multihost.follower import Follower
from sgl_jax.multihost.leader import Leader
from sgl_jax.observability import log
from sgl_jax.observability.progress import LaunchProgress, Tell, launch_progress
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.adapter_copies import AdapterCopies
from sgl_jax.runtime.compiler import cache_takes_programs, use_compile_cache
from sgl_jax.runtime.held_arrays import HeldArrays
from sgl_jax.runtime.kept_programs import KeptPrograms
from sgl_jax.runtime.memory import device_memory
from sgl_jax.runtime.placed_weights import DevicePlacer, stack_layers
from sgl_jax.runtime.platform import Platform, kernels_for, pick_devices
from sgl_jax.runtime.runner import ModelRunner, announce_to_nobody
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.settings.hub import is_hub_id, local_path
from sgl_jax.settings.server_args import ServerArgs, environment

logger = logging.getLogger(__name__)

_SEVERAL_HOSTS = "--nnodes is greater than 1; arrays of one host alone can be exchanged or released"

type Accept = Callable[[LaunchPlan], None]  # raises an error that refuses the plan


@dataclasses.dataclass(frozen=True)
class DeviceSide:
    """Programs and arrays on the devices of a host, ready to run, and the decisions behind them."""

    model: DecoderConfig
    platform: Platform
    devices: list[jax.Device]  # all hosts' devices
    plan: LaunchPlan
    runner: ModelRunner
    copies: AdapterCopies | None  # in memory, of the adapters of a launch that takes any
    grammars: Grammars | None  # on the host that plans, in a launch that takes any
    pooler: Pooler | None  # likewise, in a launch that makes vectors
    arrays: HeldArrays | None  # which can be exchanged and released; None with several hosts


def build_core(
    args: ServerArgs, accept: Accept = lambda plan: None, *, behind: bool = False, tell: Tell = lambda now: None
) -> Core:
    """Load the model, size memory, compile every program; with `behind`, where the platform's programs do, some of them
    while it serves. Raises ValueError with a line for the user, and whatever `accept` raises, which is called before any
    weight is fetched or read. `tell` is called with the progress of the start."""
    if args.nnodes > 1:
        how = "is started by sgl_jax.launch_server, on each of them"
        raise ValueError(f"--nnodes is {args.nnodes}; an engine over several machines {how}")
    started = time.perf_counter()
    return _core(args, build_device_side(args, None, accept, behind=behind, tell=tell), started)


def launch(args: ServerArgs, die: Die, tell: Tell) -> EngineCore:
    """Build the core of a single host, or the leading core of host 0. `die` ends the process from any thread, since a
    host can be lost while the engine's own thread hangs; `tell` takes the progress of the start."""
    if args.nnodes == 1:
        return build_core(args, behind=True, tell=tell)
    started = time.perf_counter()
    leader = lead(args, die)
    try:
        unite(args, leader)
        core = _core(args, build_device_side(args, leader, tell=tell), started)
    except Exception as error:
        leader.close(one_line(error))
        raise
    leader.serve(args.watchdog_timeout)
    return LeadingCore(core, leader)


def build_device_side(
    args: ServerArgs,
    hosts: Leader | Follower | None,
    accept: Accept = lambda plan: None,
    *,
    behind: bool = False,
    tell: Tell = lambda now: None,
) -> DeviceSide:
    """Load and compile for the devices of this host. `hosts` reaches the other hosts, which do the same at the same
    time; None: there are none. `behind`: as for build_core, with a single host."""
    use_compile_cache(args.compilation_cache_dir)
    grid = grid_of(args)
    platform, devices = pick_devices(args.device, grid.num_devices)
    _say_devices(args, platform, devices)
    agree = hosts.agree if hosts else lambda value: value
    device_bytes = agree(_bytes_of_a_device(devices))
    families, kind = known_families(args.model_package), devices[0].device_kind
    # A launch that cannot be is refused before the weights are fetched, and again before they are read.
    if (configs := _configs_ahead(args)) is not None:
        accept(_decide(args, families, configs, platform, kind, device_bytes, dummy=True)[-1])
    checkpoint = open_checkpoint(args.model_path, load_format=args.load_format, downloads=args.downloads)
    dummy = checkpoint.format == "dummy"
    model, draft, kernels, plan = _decide(args, families, checkpoint, platform, kind, device_bytes, dummy=dummy)
    accept(plan)
    _say_sizes(model, plan)
    grammars = None if isinstance(hosts, Follower) else grammars_of(args, model)
    pooler = None if isinstance(hosts, Follower) else pooler_of(args, model, checkpoint, families)
    placement = Placement.over(devices, grid)
    announce = hosts.announce if isinstance(hosts, Leader) else announce_to_nobody
    kept = kept_programs(args, devices) if behind else None
    options = {"stacks_layers": platform.stacks_layers, "announce": announce, "drafter": plan.drafter, "kept": kept}
    store = adapter_store(args, model, families, plan.runner_config, placement, stacked=platform.stacks_layers)
    copies = None if store is None else AdapterCopies(store, args.most_loaded_loras, announce, agree)
    runner = ModelRunner(model, plan.runner_config, kernels, placement, **options, adapters=copies)
    behind = behind and platform.compiles_behind
    num_needed = 0 if args.skip_server_warmup else runner.num_needed(behind)
    with launch_progress(logger, len(runner.programs), num_needed, tell) as progress:
        compiled = _compile(runner, progress, behind)
        report = _report_of_weights(progress, compiled)
        try:
            dtype, stacks = plan.runner_config.weight_dtype, platform.stacks_layers
            placer, seed = DevicePlacer(placement), args.random_seed or 0
            weights = read_weights(checkpoint, draft, model, families, dtype, seed, placer, report)
            weights = stack_layers(weights, placement, declare(model, dtype, stacked=True)) if stacks else weights
            progress.all_read()
            if not args.skip_server_warmup:
                progress.wait(compiled)
        except BaseException:
            runner.close()
            raise
    del checkpoint, draft  # and with them the mapped pages of its files, before the pool is made
    cache_takes_programs(args.compilation_cache_dir)  # the programs may have filled the disk
    barrier = functools.partial(agree, 0)
    weights = with_kv_scales(weights, model, plan, kernels, placement, kept, stacks_layers=stacks, barrier=barrier)
    runner.start(weights, barrier)
    _say_programs_left(runner)
    reads = other_weights(args, families, model, dtype, platform, kind, placement)
    arrays = HeldArrays(runner, reads) if hosts is None else None
    return DeviceSide(model, platform, devices, plan, runner, copies, grammars, pooler, arrays)


def _compile(runner: ModelRunner, progress: LaunchProgress, behind: bool) -> Future[None]:
    """Begin to compile, and let `progress` know of each program."""
    return runner.compile(lambda _, __, each: progress.compiled(each.program.name, each.cache_hit), behind=behind)


def _report_of_weights(progress: LaunchProgress, compiled: Future[None]) -> Callable[[float, int], None]:
    """Return what is to be told how much has been read. It raises the error of a program that could not be compiled."""

    def report(fraction: float, num_bytes: int) -> None:
        progress.read(fraction, num_bytes)
        if compiled.done():
            compiled.result()

    return report


def _bytes_of_a_device(devices: list[jax.Device]) -> int:
    """Return the memory of each of this host's devices. Virtual CPU devices divide the host's among themselves."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    return device_memory(here[0]) // (len(here) if here[0].platform == "cpu" else 1)


def kept_programs(args: ServerArgs, devices: list[jax.Device]) -> KeptPrograms | None:
    """Return where compiled programs are kept. None: --compilation-cache-dir is no folder of this machine."""
    variables = {
        name: value for name, value in environment().items() if name.startswith(("XLA", "LIBTPU", "TPU", "JAX"))
    }
    folder = args.compilation_cache_dir
    return None if "://" in folder else KeptPrograms(folder, devices, variables)


def _say_devices(args: ServerArgs, platform: Platform, devices: list[jax.Device]) -> None:
    logger.info(log.banner(__version__, args.model_path, [device.device_kind for device in devices]))
    logger.info(log.changed_args_line(args.changed()))
    if (share := args.speculative_simulated_acceptance) is not None:
        logger.warning("--speculative-simulated-acceptance is %s: drafts are SIMULATED, answers are nonsense", share)
    present = len(jax.local_devices(backend=platform.name)) * args.nnodes
    if args.tp_size is None and present > len(devices):
        logger.warning(log.unused_devices_line(platform.name, len(devices), present, args.dp_size))


def _say_sizes(model: DecoderConfig, plan: LaunchPlan) -> None:
    if model.longer is not None:
        cure = f"--context-length up to {model.longer.length} takes those for all requests"
        end = f"Contexts end at {model.context_length} tokens, beyond which longrope has other factors"
        logger.warning("%s: %s", end, cure)
    weights, kv, length = plan.weight_bytes, plan.memory.kv_bytes, plan.runner_config.context_length
    free = plan.memory.total_bytes - plan.held_bytes - kv
    table = log.memory_table(weights=weights, kv=kv, free=free, kv_tokens=plan.kv_tokens, context_length=length)
    logger.info("%s", table)
    if (room := plan.runner_config.adapters) is not None:
        sites, taken = ", ".join(room.sites), log.size(plan.adapter_bytes)
        logger.info("Adapters: %d slots of rank %d for %s take %s a device", room.number, room.rank, sites, taken)
    say_weights(model, model.shard(plan.grid), plan.runner_config.weight_dtype)


def _say_programs_left(runner: ModelRunner) -> None:
    if num_left := runner.num_compiling:
        logger.info("%d of %d programs are still to be compiled, beside requests", num_left, len(runner.programs))


def _configs_ahead(args: ServerArgs) -> Checkpoint | None:
    """Fetch the configs alone of a model that is named by its hub id. None: there are no weights to fetch, or they have
    been fetched, as they are before several hosts find each other."""
    if args.load_format == "dummy" or args.nnodes > 1 or not is_hub_id(args.model_path):
        return None
    folder = local_path(args.model_path, CONFIG_FILES, args.downloads)
    if any(folder.glob("*.gguf")):  # put there by another tool; it may bring the config
        return None
    if not (folder / "config.json").exists():
        cure = "give a model of Hugging Face's format, or the path of a .gguf file"
        raise ModelError(f"{args.model_path} has no config.json; {cure}")
    return open_checkpoint(str(folder), load_format="gguf" if args.load_format == "gguf" else "dummy")


def _decide(
    args: ServerArgs,
    families: Families,
    checkpoint: Checkpoint,
    platform: Platform,
    device_kind: str,
    device_bytes: int,
    *,
    dummy: bool,
) -> tuple[DecoderConfig, Checkpoint | None, Kernels, LaunchPlan]:
    model, draft = describe_model(args, families, checkpoint, platform, device_kind, dummy=dummy)
    adapters = plan_adapters(args, model, families)
    kernels = kernels_for(args.attention_backend, platform, model)
    sizes = {"stored_dtype": checkpoint.dtype, "device_bytes": device_bytes, "adapters": adapters}
    plan = plan_launch(args, model, platform, kernels, device_kind=device_kind, **sizes)
    return model, draft, kernels, plan


def _core(args: ServerArgs, device_side: DeviceSide, started: float) -> Core:
    model, plan, runner, devices = device_side.model, device_side.plan, device_side.runner, device_side.devices
    grid, memory = plan.grid, plan.memory
    page_size, shares = plan.runner_config.page_size, not args.disable_radix_cache
    caches = [PrefixCache(memory.num_pages, page_size, enabled=shares) for _ in range(grid.data)]
    slots, copies = plan.runner_config.adapters, device_side.copies
    adapters = None if slots is None or copies is None else Adapters(copies, slots.number)
    if (grammars := device_side.grammars) is not None:
        grammars.wait()
    parts = {"adapters": adapters.slots if adapters else None, "find_grammar": grammars.find if grammars else None}
    scheduler = Scheduler(plan.scheduler_config, caches, **parts)
    info = EngineInfo(
        model_path=args.model_path,
        architecture=model.architecture,
        dtype=plan.runner_config.compute_dtype,
        quantization=str(model.weight_scheme or ""),
        platform=device_side.platform.name,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        vocab_size=model.vocab_size,
        context_length=plan.runner_config.context_length,
        eos_token_ids=list(model.eos_token_ids),
        page_size=page_size,
        max_total_tokens=plan.kv_tokens,
        max_running_requests=plan.runner_config.num_rows,
        chunked_prefill_size=plan.scheduler_config.max_prefill_tokens * grid.data,
        num_programs=len(runner.programs),
        programs=[program.name for program in runner.programs],
        device_bytes=memory.total_bytes,
        device_weight_bytes=plan.weight_bytes,
        device_adapter_bytes=plan.adapter_bytes,
        device_kv_bytes=memory.kv_bytes,
        weight_bytes=plan.weight_bytes * len(devices),
        kv_bytes_per_token=memory.bytes_per_token * grid.tensor,
        parameters_per_token=parameters_per_token(model),
        adapters=[adapters.load_now(a.name, a.path, a.pinned) for a in args.adapters] if adapters else [],
        max_lora_rank=slots.rank if slots else 0,
        takes_grammars=grammars is not None,
        priority_sign=args.priority_sign,
        pooling=None if device_side.pooler is None else device_side.pooler.info,
        simulated=args.speculative_simulated_acceptance is not None,
        start_seconds=time.perf_counter() - started,
    )
    return Core(
        scheduler,
        runner,
        info,
        overlap=not args.disable_overlap_schedule,
        random_seed=args.random_seed,
        decode_log_interval=args.decode_log_interval,
        profiler_dir=args.profiler_dir,
        draft_model=draft_model_name(args),
        adapters=adapters,
        grammars=grammars,
        pooler=device_side.pooler,
        trainer=TrainerCalls(device_side.arrays, _SEVERAL_HOSTS),
    )
