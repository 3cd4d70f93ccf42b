"""Finds the compiled library for this processor, and makes its call known to XLA."""

import ctypes
import functools
import sysconfig
from pathlib import Path

import jax

_V3 = {"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Libraries that setup.py builds, the fastest first, and the processor's flags (as in /proc/cpuinfo) that each needs.
LIBRARIES: dict[str, set[str]] = {
    "x86_64_v4_bf16": _V4 | {"avx512_bf16"},
    "x86_64_v4": _V4,
    "x86_64_v3": _V3,
    "baseline": set(),
}


def usable(flags: set[str]) -> dict[str, Path]:
    """Return the libraries that were built and that a processor with these flags can run, the fastest first."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    paths = {name: Path(__file__).with_name(name + suffix) for name, needed in LIBRARIES.items() if needed <= flags}
    return {name: path for name, path in paths.items() if path.exists()}


def processor_flags() -> set[str]:
    """Return the flags of this machine's processor; none where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


@functools.cache  # XLA refuses a second registration
def register(path: Path) -> str:
    """Make a library's call known to XLA; return the name that it has there."""
    name = f"sgl_jax_attention_{path.name.partition('.')[0]}"
    call = ctypes.CDLL(str(path)).sgl_jax_attention
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(call), platform="cpu")
    return name


def find_target() -> str | None:
    """Return the name of the fastest library's call; None if no library was built that this processor can run."""
    path = next(iter(usable(processor_flags()).values()), None)
    return None if path is None else register(path)
