"""Facts that the operating system shows: host, limits, compile cache, TPUs and GPUs. Touches no device, loads no runtime.

Reads files; a missing one leaves None. `root` is the root of the file system, so that tests can describe other machines.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sgl_jax.observability.log import size
from sgl_jax.runtime.control_groups import ROOT, cpu_limit, memory_limit, read
from sgl_jax.tools.environment.facts import CompileCache, Gpus, Machine, Tpus

_CACHE_SUFFIX = "-cache"  # suffix of jax's files; next to each lies one that notes when it was last read
_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"  # PCI vendors
# As in jax's own table. Google has other devices on the PCI bus, network and disk among them.
_TPUS = {"0x0027": "TPU v2 or v3", "0x0056": "TPU", "0x005e": "TPU v4", "0x0062": "TPU v5p", "0x0063": "TPU v5e"}
_TPUS |= {"0x006f": "TPU v6e", "0x0076": "TPU 7x", "0x0083": "TPU 8i", "0x007c": "TPU 8t"}
_DISPLAY = "0x03"  # PCI class: an NVIDIA card has audio and USB functions, too
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
NVIDIA_SMI_TIMEOUT_S = 20.0  # it hangs when the driver does

Run = Callable[[Sequence[str], float], str]  # command, timeout in seconds -> its output; raises OSError


def look(environ: Mapping[str, str], root: Path = ROOT) -> Machine:
    """Describe the host, as far as it can be found out."""
    model = _found(r"^(?:model name|Model)\s*:\s*(.+)$", root / "proc/cpuinfo")
    memory = _found(r"^MemTotal:\s+(\d+) kB$", root / "proc/meminfo")
    distribution = _found(r'^PRETTY_NAME="?([^"\n]+)', root / "etc/os-release")
    marks = {"Docker": ".dockerenv", "Podman": "run/.containerenv"}
    containers = ["Kubernetes"] if "KUBERNETES_SERVICE_HOST" in environ else []
    containers += [kind for kind, mark in marks.items() if (root / mark).exists()]
    return Machine(
        hostname=socket.gethostname() or "unknown",
        system=", ".join((*distribution, f"{platform.system()} {platform.release()}")),
        python=f"{platform.python_version()} ({platform.machine()}), {sys.executable or 'unknown'}",
        cpu_model=next(iter(model), platform.processor() or platform.machine() or "unknown"),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory=int(memory[0]) << 10 if memory else None,
        container=next(iter(containers), ""),
        cgroup_cpus=cpu_limit(root),
        cgroup_memory=memory_limit(root),
        limits=resource_limits(),
    )


def _found(pattern: str, path: Path) -> list[str]:
    return re.findall(pattern, read(path), re.MULTILINE)


def resource_limits() -> dict[str, tuple[int | None, ...]]:
    """Return (soft, hard) as `ulimit` shows them, memory in bytes; None: no limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    names = {"open files": "NOFILE", "locked memory": "MEMLOCK", "processes and threads": "NPROC"}
    found = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{number}")) for name, number in names.items()}
    return {name: tuple(None if n == resource.RLIM_INFINITY else n for n in pair) for name, pair in found.items()}


def compile_cache(path: str, source: str) -> CompileCache:
    """Describe the folder of compiled programs: whether it can be written, and what it holds."""
    if "://" in path:
        return CompileCache(path, source, "remote, not looked at")
    folder = Path(os.path.abspath(path))
    existing = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if problem := _cannot_write(existing):
        return CompileCache(path, source, "cannot be written", f"{existing}: {problem}")
    free = shutil.disk_usage(existing).free
    if existing != folder:
        return CompileCache(path, source, "is not there yet, can be made", free=free)
    sizes = {each.name: each.stat().st_size for each in folder.iterdir() if each.is_file()}
    programs = sum(name.endswith(_CACHE_SUFFIX) for name in sizes)
    return CompileCache(path, source, f"{programs} programs, {size(sum(sizes.values()))}, can be written", free=free)


def _cannot_write(folder: Path) -> str:
    """Return why no file can be made in a folder. It is tried: permissions do not tell of read-only or full disks."""
    if not folder.is_dir():
        return "not a directory"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def tpus(root: Path = ROOT) -> Tpus:
    """Return the TPU chips on the PCI bus and their device files."""
    on_pci = _pci_devices(root)
    chips = tuple(_TPUS[device] for vendor, device, _ in on_pci if vendor == _GOOGLE and device in _TPUS)
    nodes = _nodes(root, "dev", r"accel\d+")
    if chips or not on_pci:  # VFIO serves any device: where the bus can be seen, it must show TPUs as well
        nodes += _nodes(root, "dev/vfio", r"\d+")
    return Tpus(chips, nodes)


def gpus(root: Path = ROOT, run: Run | None = None) -> Gpus:
    """Return the GPUs' device files and what nvidia-smi says; `run` starts it, by default with a bound on its time."""
    output = ""
    try:
        output, smi = (run or _run)(_NVIDIA_SMI, NVIDIA_SMI_TIMEOUT_S), "lists no GPU"
    except OSError as error:
        smi = "not found" if isinstance(error, FileNotFoundError) else str(error)
    found = re.findall(r"^([^,\n]+), ([^,\n]+), ([^,\n]+)$", output, re.MULTILINE)
    return Gpus(
        nodes=_nodes(root, "dev", r"nvidia\d+|nvidiactl|dxg|kfd"),
        on_pci=sum(vendor == _NVIDIA and kind.startswith(_DISPLAY) for vendor, _, kind in _pci_devices(root)),
        driver=found[0][0] if found else None,
        nvidia_smi="ok" if found else smi,
        names=tuple(f"{name} ({memory})" for _, name, memory in found),
    )


def _pci_devices(root: Path) -> list[tuple[str, str, str]]:
    """Return (vendor, device, class), each like 0x1ae0, of function 0 of all that is on the PCI bus."""
    folders = sorted(root.glob("sys/bus/pci/devices/*.0"))
    return [(read(each / "vendor"), read(each / "device"), read(each / "class")) for each in folders]


def _nodes(root: Path, folder: str, pattern: str) -> tuple[str, ...]:
    names = sorted(path.name for path in (root / folder).glob("*"))
    return tuple(f"/{folder}/{name}" for name in names if re.fullmatch(pattern, name))


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(said[0] if said else f"exit code {done.returncode}")
    return done.stdout
