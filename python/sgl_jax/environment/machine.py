"""The host: processor, memory, limits, container, disks, compile cache. Reads files; a missing one leaves None.

`root` is the root of the file system, so that tests can describe other machines.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sgl_jax.environment.facts import CompileCache, Disk, Limit, Machine

# By the names of Linux: what decides how fast matmuls in float32, bfloat16 and int8 are.
_INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme"),
)
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes "no limit" as a huge number
_CACHE_SUFFIX = "-cache"  # of jax's own files; next to each lies one that notes when it was last read


def look(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    cpu = _cpu_info(read(root / "proc/cpuinfo"))
    memory = _memory_info(read(root / "proc/meminfo"))
    cgroup_cpus, cgroup_memory = cgroup_limits(root)
    return Machine(
        hostname=socket.gethostname() or "unknown",
        system=_system(root),
        python=f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})",
        executable=sys.executable or "unknown",
        cpu_model=cpu["model"] or platform.processor() or "unknown",
        cpus=os.cpu_count(),
        cpus_allowed=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in cpu["flags"].split()),
        memory=memory.get("MemTotal") or _physical_memory(),
        memory_available=memory.get("MemAvailable"),
        shared_memory=_disk_size(root / "dev/shm"),
        container=_container(environ, root),
        cgroup_cpus=cgroup_cpus,
        cgroup_memory=cgroup_memory,
        limits=(*resource_limits(), *_thread_limits(root)),
    )


def read(path: Path) -> str:
    """A small text file, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _system(root: Path) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', read(root / "etc/os-release"), re.MULTILINE)
    kernel = f"{platform.system()} {platform.release()}"
    return f"{match[1]}, {kernel}" if match else kernel


def _cpu_info(text: str) -> dict[str, str]:
    """Model and flags of the first processor; ARM calls its flags Features and names no model."""
    found = {}
    for key, names in (("model", "model name|Model"), ("flags", "flags|Features")):
        match = re.search(rf"^(?:{names})\s*:\s*(.+)$", text, re.MULTILINE)
        found[key] = match[1].strip() if match else ""
    return found


def _memory_info(text: str) -> dict[str, int]:
    return {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _disk_size(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return None


def _container(environ: Mapping[str, str], root: Path) -> str:
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    match = re.search(r"docker|kubepods|containerd|lxc|libpod", read(root / "proc/1/cgroup"))
    return match[0] if match else ""


def cgroup_limits(root: Path = Path("/")) -> tuple[float | None, int | None]:
    """(processors, bytes) this process may use by its cgroup and those above it, in either version; None: no limit."""
    groups = re.findall(r"^\d+:([^:]*):(/.*)$", read(root / "proc/self/cgroup"), re.MULTILINE)
    paths = {controller: path for names, path in groups for controller in names.split(",")}
    base = root / "sys/fs/cgroup"
    cpus: list[float] = []
    memory: list[int] = []
    for folder in _upwards(base, paths.get("", "/")):
        quota = read(folder / "cpu.max").split()  # "max 100000", or two numbers
        if len(quota) == 2 and quota[0].isdigit():
            cpus.append(int(quota[0]) / int(quota[1]))
        memory += _number(folder / "memory.max")
    for folder in _upwards(base / "cpu", paths.get("cpu", "/")):
        for quota, period in zip(
            _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"), strict=False
        ):
            cpus.append(quota / period)
    for folder in _upwards(base / "memory", paths.get("memory", "/")):
        memory += [limit for limit in _number(folder / "memory.limit_in_bytes") if limit < _NO_LIMIT]
    return min(cpus, default=None), min(memory, default=None)


def _upwards(base: Path, path: str) -> list[Path]:
    """The folder of a cgroup and all above it. In a container the path may be the host's: then only `base` exists."""
    inside = Path(path.lstrip("/"))
    return [base / inside, *(base / parent for parent in inside.parents)]


def _number(path: Path) -> list[int]:
    text = read(path)
    return [int(text)] if text.isdigit() else []


def resource_limits() -> tuple[Limit, ...]:
    """As `ulimit` shows them."""
    try:
        import resource
    except ImportError:  # not on Windows
        return ()
    found = []
    for name, constant, unit in (
        ("open files", "RLIMIT_NOFILE", ""),
        ("locked memory", "RLIMIT_MEMLOCK", "bytes"),
        ("processes and threads", "RLIMIT_NPROC", ""),
    ):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            soft, hard = resource.getrlimit(getattr(resource, constant))
            infinite = resource.RLIM_INFINITY
            found.append(Limit(name, None if soft == infinite else soft, None if hard == infinite else hard, unit))
    return tuple(found)


def _thread_limits(root: Path) -> list[Limit]:
    return [Limit("threads of the system", most, most) for most in _number(root / "proc/sys/kernel/threads-max")]


def disk(use: str, path: str) -> Disk:
    """Room on the disk of a folder, which may not exist yet."""
    try:
        usage = shutil.disk_usage(_existing(Path(path)))
        return Disk(use, path, usage.free, usage.total)
    except OSError:
        return Disk(use, path, None, None)


def compile_cache(path: str, source: str) -> CompileCache:
    """The folder of compiled programs: whether it can be written, and what it holds."""
    if "://" in path:
        return CompileCache(path, source, "remote")
    folder = Path(path)
    existing = _existing(folder)
    problem = _cannot_write(existing)
    if problem:
        problem = problem if existing == folder else f"{existing}: {problem}"
        return CompileCache(path, source, "not writable", problem)
    if existing != folder:
        return CompileCache(path, source, "will be made")
    programs = size = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another process may be tidying up
                programs += entry.name.endswith(_CACHE_SUFFIX)
                size += entry.stat().st_size if entry.is_file() else 0
    return CompileCache(path, source, "ready", "", programs, size)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = Path(os.path.abspath(path))
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)


def _cannot_write(folder: Path) -> str:
    """Why no file can be made in a folder. Tried out: permissions do not tell of read-only or full disks."""
    if not folder.is_dir():
        return "not a directory"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
