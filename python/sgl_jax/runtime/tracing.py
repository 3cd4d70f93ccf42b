"""Names of a step's host stages in JAX's profiler, and the recording of profiles.

Names of device stages come from jax.named_scope in step.py and models/decoder.py.
"""

import contextlib
import os
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from sgl_jax.runtime import control_groups

_NOTHING = contextlib.nullcontext()
_recording = jax.profiler.TraceAnnotation.is_enabled  # also if other code of this process records


class JaxTracer:
    """The engine.profiling.Tracer that uses JAX's profiler, which records one profile of a process at a time."""

    def __init__(self) -> None:
        self._session = Path()
        self._bytes_before = 0

    def step(self, number: int) -> AbstractContextManager[object]:
        return jax.profiler.StepTraceAnnotation("step", step_num=number) if _recording() else _NOTHING

    def stage(self, name: str) -> AbstractContextManager[object]:
        return jax.profiler.TraceAnnotation(name) if _recording() else _NOTHING

    def start(self, folder: str | None, host_level: int | None, python_level: int | None) -> str:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="sgl-jax-profile-")
        folder = os.path.abspath(folder)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # fails now if the folder cannot be written, not after the steps have been recorded
        options = jax.profiler.ProfileOptions()
        # Recording every Python call is slow, and the stages tell most of the same.
        options.python_tracer_level = 0 if python_level is None else python_level
        if host_level is not None:
            options.host_tracer_level = host_level
        # JAX names sessions by the second, and two in one second would overwrite each other.
        options.session_id = f"{time.strftime('%Y_%m_%d_%H_%M_%S')}_{time.time_ns() % 10**9:09}"
        self._bytes_before = _resident_bytes()
        jax.profiler.start_trace(folder, profiler_options=options)
        self._session = Path(folder, "plugins", "profile", options.session_id)
        return folder

    def num_bytes(self) -> int:
        return _resident_bytes() - self._bytes_before

    def stop(self) -> list[str]:
        jax.profiler.stop_trace()
        return sorted(str(path) for path in self._session.iterdir())


def _resident_bytes() -> int:
    """Return the memory of this process; 0 where the system does not say."""
    pages = control_groups.read(Path("/proc/self/statm")).split()[1:2]
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0
