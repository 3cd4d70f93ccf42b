"""Compilation of programs ahead of use, and a count of compilations that come later."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import jax.monitoring
import numpy as np

from sgl_jax.observability import log

logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_ENTRY_BYTES = 1 << 20  # about the size of a program in the cache
_LOWEST = 19  # priority, as of nice
_BEHIND = "sgl-jax-compile-behind"  # name of the threads that compile what nobody waits for

# XLA options that are not the default, by kind of device.
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    # Without it, each step copies every weight of a scan into tiles of 16 rows: 1.7 GB for a shard of Qwen3-8B.
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}
}
# Options of programs whose collectives are to run beside products (Program.overlaps). The SparseCores of a v6e exchange data
# while its TensorCore multiplies; those of a v7x do so without being told.
OVERLAP_OPTIONS: dict[str, dict[str, str]] = {
    "TPU v6 lite": {
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_use_tc_device_shape_on_sc": "true",
        "xla_sc_disable_megacore_partitioning": "true",
    }
}


type Payload = jax.Array | np.ndarray | list[Payload] | dict[str, Payload]


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted function with the abstract arguments for which it is compiled: device values, an i32 vector and, for some, a
    payload. It returns a tuple of device values.

    A value that it takes and gives is donated; a value that it only gives is its result. A payload is data that fits no
    vector, such as the weights of an adapter. Every process reads it from the announced source.
    """

    name: str
    function: jax.stages.Wrapped
    args: tuple[object, ...]  # the values taken, the vector, the payload
    takes: tuple[str, ...] = ()  # names of device values
    gives: tuple[str, ...] = ()
    read: Callable[[str], Payload] | None = None  # reads the payload from the source that host 0 announced
    outputs: object = ()  # a tree of the form of what it returns
    overlaps: bool = False  # its collectives should run beside its products

    @property
    def vector_shape(self) -> tuple[int, ...]:
        vector = self.args[len(self.takes)]
        assert isinstance(vector, jax.ShapeDtypeStruct)
        return vector.shape

    @property
    def device_kind(self) -> str:
        """Kind of the devices that its arguments are placed on, or of the default device."""
        sharding = jax.tree.leaves(self.args)[0].sharding
        device = next(iter(sharding.device_set)) if sharding is not None else jax.devices()[0]
        return device.device_kind


class Kept(Protocol):
    """Compiled programs of earlier starts (kept_programs.py)."""

    def load(self, program: Program, precision: str | None) -> jax.stages.Compiled | None: ...

    def save(self, program: Program, precision: str | None, call: jax.stages.Compiled) -> None: ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    program: Program
    call: jax.stages.Compiled
    seconds: float
    cache_hit: bool


class CompileWatch:
    """Counts this process's compilations, and tells a thread whether its last one was read from the compilation cache."""

    def __init__(self) -> None:
        self.count = 0  # without those that nobody waits for (compile_all's `behind`), of any engine
        self._thread = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and not threading.current_thread().name.startswith(_BEHIND):
            self.count += 1

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == _CACHE_HIT:
            self._thread.hit = True

    def took_hit(self) -> bool:
        """Return whether this thread has read a program from the cache since its last call."""
        hit, self._thread.hit = getattr(self._thread, "hit", False), False
        return hit


def use_compile_cache(folder: str) -> None:
    """Keep every compiled program in the folder, also small and quickly compiled ones."""
    cache_takes_programs(folder)
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")  # one for each program
    jax.config.update("jax_compilation_cache_dir", folder if "://" in folder or os.path.isdir(folder) else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_takes_programs(folder: str) -> bool:
    """Return whether programs can be kept in the folder. If not, one line in the log says why. "scheme://…" is not tried."""
    try:
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_ENTRY_BYTES))
    except OSError as error:
        advice = "the next start compiles every program again; choose a folder with write permission and free space"
        said = f"--compilation-cache-dir is {folder}, where nothing can be written ({error.strerror}): {advice}"
        log.once(logger, folder, said, logging.WARNING)
        return False
    return True


def matmul_precision(dtype: str) -> str:
    """Return the value of jax.default_matmul_precision with which float32 is not computed in passes of bfloat16."""
    return "highest" if dtype == "float32" else "default"


def compile_all(
    programs: Iterable[Program],
    watch: CompileWatch,
    report: Callable[[int, int, Compiled], None],
    *,
    absent: jax.sharding.Mesh | None = None,
    stopped: threading.Event | None = None,
    behind: bool = False,
    kept: Kept | None = None,
) -> dict[str, jax.stages.Compiled]:
    """Compile programs in parallel threads, in their order; return the compiled ones by name.

    `report` is called with the number done, the number of all, and the program just compiled. `absent`: the mesh of TPUs that
    are not here, for programs to be read but not called. `kept`: where programs are looked for, and put. `behind`: one thread of low priority compiles, beside requests, and no
    CompileWatch counts it. The first failure is raised and the remaining programs are left out; likewise, with
    CancelledError, when another thread sets `stopped`.
    """
    programs = list(programs)
    precision = jax.config.jax_default_matmul_precision  # the caller's, which threads do not inherit

    def one(program: Program) -> Compiled:
        if stopped is not None and stopped.is_set():
            raise concurrent.futures.CancelledError
        watch.took_hit()
        start = time.perf_counter()
        if kept is not None and (call := kept.load(program, precision)) is not None:
            return Compiled(program, call, time.perf_counter() - start, cache_hit=True)
        # The abstract mesh tells kernels the TPU's generation.
        mesh = jax.sharding.use_abstract_mesh(absent.abstract_mesh) if absent else contextlib.nullcontext()
        with jax.default_matmul_precision(precision), mesh:
            lowered = program.function.trace(*program.args).lower(lowering_platforms=("tpu",) if absent else None)
            call = _compiled(lowered, program)
        hit = watch.took_hit()
        if (
            kept is not None and not hit
        ):  # on CPUs a program that was read from the cache is not whole when it is written again
            kept.save(program, precision, call)
        return Compiled(program, call, time.perf_counter() - start, hit)

    def lower_priority() -> None:
        if behind and sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)

    done: dict[str, jax.stages.Compiled] = {}
    number = 1 if behind else min(len(programs), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(number, _BEHIND if behind else "", lower_priority) as threads:
        try:
            for future in concurrent.futures.as_completed([threads.submit(one, p) for p in programs]):
                compiled = future.result()
                done[compiled.program.name] = compiled.call
                report(len(done), len(programs), compiled)
                _return_freed_memory()
        finally:
            threads.shutdown(cancel_futures=True)
    return done


def _return_freed_memory() -> None:
    """Give back what compiling has freed, hundreds of megabytes, which glibc keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _compiled(lowered: jax.stages.Lowered, program: Program) -> jax.stages.Compiled:
    kind = program.device_kind
    options = COMPILER_OPTIONS.get(kind, {}) | (OVERLAP_OPTIONS.get(kind, {}) if program.overlaps else {})
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if not options or "No such compile option" not in str(error):
            raise
        names = ", ".join(options)
        logger.warning(f"this libtpu does not know {names}; compiling without, which is slower on {kind}")
        return lowered.compile()
