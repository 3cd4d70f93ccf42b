"""Compiling programs ahead of use, and noticing when one is compiled after that."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable

import jax
import jax.monitoring
import numpy as np

logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"

# What XLA is told beyond its defaults, by kind of device.
COMPILER_OPTIONS = {
    # Or each step first copies every weight of a scan into tiles of 16 rows: 1.7 GB for a share of Qwen3-8B.
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"},
}


type Payload = jax.Array | np.ndarray | list[Payload] | dict[str, Payload]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of device values, an i32 vector and perhaps a payload, and the (abstract) arguments it is compiled
    for: the values it takes, the vector, the payload. It returns the values it gives, as a tuple.

    A value it takes and gives is donated; one it only gives is its result. A payload is what no vector holds, such as the
    weights of an adapter: every process reads its own from the source that is announced.
    """

    name: str
    function: jax.stages.Wrapped
    args: tuple[object, ...]
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    read: Callable[[str], Payload] | None = None  # source -> payload

    @property
    def vector_shape(self) -> tuple[int, ...]:
        vector = self.args[len(self.takes)]
        assert isinstance(vector, jax.ShapeDtypeStruct)
        return vector.shape

    @property
    def device_kind(self) -> str:
        """Kind of the devices its arguments lie on; of the default ones where the arguments do not say."""
        sharding = jax.tree.leaves(self.args)[0].sharding
        device = next(iter(sharding.device_set)) if sharding is not None else jax.devices()[0]
        return device.device_kind


@dataclasses.dataclass(frozen=True)
class Compiled:
    program: Program
    call: jax.stages.Compiled
    seconds: float
    cache_hit: bool


class CompileWatch:
    """Counts this process's compilations from its creation on, and tells each thread whether its last hit the cache."""

    def __init__(self) -> None:
        self.count = 0
        self._thread = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            self.count += 1

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == _CACHE_HIT:
            self._thread.hit = True

    def took_hit(self) -> bool:
        """Whether this thread read a program from the cache since it last asked."""
        hit, self._thread.hit = getattr(self._thread, "hit", False), False
        return hit


def use_compile_cache(folder: str) -> None:
    """Keep every compiled program there, however small or quickly made."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def matmul_precision(dtype: str) -> str:
    """The value for jax.default_matmul_precision: float32 models are computed in float32, not in passes of bfloat16."""
    return "highest" if dtype == "float32" else "default"


def compile_all(
    programs: Iterable[Program],
    watch: CompileWatch,
    report: Callable[[int, int, Compiled], None],
    *,
    absent: jax.sharding.Mesh | None = None,
    stopped: threading.Event | None = None,
) -> dict[str, jax.stages.Compiled]:
    """Compile programs in parallel threads, in their order; name -> callable. report(how many are done, of how many,
    which). `absent`: the mesh of TPUs that are not here; such programs can be read, not called. The first failure is
    raised, and what has not been begun is left; so it is once another thread sets `stopped`, with CancelledError."""
    programs = list(programs)
    precision = jax.config.jax_default_matmul_precision  # the caller's, which threads do not inherit

    def one(program: Program) -> Compiled:
        if stopped is not None and stopped.is_set():
            raise concurrent.futures.CancelledError
        watch.took_hit()
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            if absent is None:
                call = _compiled(program.function.lower(*program.args), program.device_kind)
            else:
                with jax.sharding.use_abstract_mesh(absent.abstract_mesh):  # by it kernels learn the TPU's generation
                    lowered = program.function.trace(*program.args).lower(lowering_platforms=("tpu",))
                    call = _compiled(lowered, program.device_kind)
        return Compiled(program, call, time.perf_counter() - start, watch.took_hit())

    done: dict[str, jax.stages.Compiled] = {}
    with concurrent.futures.ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1)) as threads:
        try:
            for future in concurrent.futures.as_completed([threads.submit(one, p) for p in programs]):
                compiled = future.result()
                done[compiled.program.name] = compiled.call
                report(len(done), len(programs), compiled)
        finally:
            threads.shutdown(cancel_futures=True)
    return done


def _compiled(lowered: jax.stages.Lowered, device_kind: str) -> jax.stages.Compiled:
    options = COMPILER_OPTIONS.get(device_kind)
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if options is None or "No such compile option" not in str(error):
            raise
        logger.warning(
            f"this libtpu does not know {', '.join(options)}; compiling without, which is slower on {device_kind}"
        )
        return lowered.compile()
