"""Finds the compiled library for this processor, and makes its calls known to XLA."""

import ctypes
import dataclasses
import functools
from pathlib import Path

import jax

_V3 = {"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Libraries that setup.py builds, the fastest first, and the processor's flags (as in /proc/cpuinfo) that each needs.
LIBRARIES: dict[str, set[str]] = {
    "x86_64_v4_bf16": _V4 | {"avx512_bf16", "avx512_vnni"},
    "x86_64_v4": _V4,
    "x86_64_v3": _V3,
    "baseline": set(),
}


@dataclasses.dataclass(frozen=True)
class Library:
    """A library's calls, by the names that XLA knows them by."""

    adapters: str
    attention: str
    dense: str
    logprobs: str
    quantised: str
    sample: str
    untouched: str


def usable(flags: set[str]) -> dict[str, Path]:
    """Return the libraries that were built and that a processor with these flags can run, the fastest first."""
    paths = {name: Path(__file__).with_name(f"{name}.abi3.so") for name, needed in LIBRARIES.items() if needed <= flags}
    return {name: path for name, path in paths.items() if path.exists()}


def processor_flags() -> set[str]:
    """Return the flags of this machine's processor; none where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


@functools.cache  # XLA refuses a second registration
def register(path: Path) -> Library:
    """Make a library's calls known to XLA."""
    functions, names = ctypes.CDLL(str(path)), {}
    for field in dataclasses.fields(Library):
        names[field.name] = f"sgl_jax_{field.name}_{path.name.partition('.')[0]}"
        call = getattr(functions, f"sgl_jax_{field.name}")
        jax.ffi.register_ffi_target(names[field.name], jax.ffi.pycapsule(call), platform="cpu")
    return Library(**names)


def find_library() -> Library | None:
    """Return the fastest library; None if none was built that this processor can run."""
    path = next(iter(usable(processor_flags()).values()), None)
    return None if path is None else register(path)
