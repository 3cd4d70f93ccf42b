"""The host: processor, memory, limits, container, compile cache. Reads files; a missing one leaves None.

`root` is the root of the file system, so that tests can describe other machines.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sgl_jax.environment.facts import CompileCache, Machine
from sgl_jax.observability.log import size

_CACHE_SUFFIX = "-cache"  # of jax's own files; next to each lies one that notes when it was last read


def look(environ: Mapping[str, str], root: Path = Path("/")) -> Machine:
    model = _found(r"^(?:model name|Model)\s*:\s*(.+)$", root / "proc/cpuinfo")
    memory = _found(r"^MemTotal:\s+(\d+) kB$", root / "proc/meminfo")
    distribution = _found(r'^PRETTY_NAME="?([^"\n]+)', root / "etc/os-release")
    cgroup_cpus, cgroup_memory = cgroup_limits(root)
    return Machine(
        hostname=socket.gethostname() or "unknown",
        system=", ".join((*distribution, f"{platform.system()} {platform.release()}")),
        python=f"{platform.python_version()} ({platform.machine()}), {sys.executable or 'unknown'}",
        cpu_model=next(iter(model), platform.processor() or "unknown"),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory=int(memory[0]) << 10 if memory else None,
        container=_container(environ, root),
        cgroup_cpus=cgroup_cpus,
        cgroup_memory=cgroup_memory,
        limits=resource_limits(),
    )


def read(path: Path) -> str:
    """A small text file, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _found(pattern: str, path: Path) -> list:
    return re.findall(pattern, read(path), re.MULTILINE)


def _container(environ: Mapping[str, str], root: Path) -> str:
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "Kubernetes"
    if (root / ".dockerenv").exists():
        return "Docker"
    return "Podman" if (root / "run/.containerenv").exists() else ""


def cgroup_limits(root: Path = Path("/")) -> tuple[float | None, int | None]:
    """(processors, bytes) this process may use by its cgroup and those above it; None: no limit."""
    inside = Path(next(iter(_found(r"^0::/(.*)$", root / "proc/self/cgroup")), ""))
    cpus, memory = [], []
    for group in (inside, *inside.parents):  # in a container the path may be the host's: then only the root exists
        folder = root / "sys/fs/cgroup" / group
        cpus += [int(quota) / int(period) for quota, period in _found(r"^(\d+) (\d+)$", folder / "cpu.max")]
        memory += map(int, _found(r"^\d+$", folder / "memory.max"))
    return min(cpus, default=None), min(memory, default=None)


def resource_limits() -> dict[str, tuple[int | None, int | None]]:
    """(soft, hard) as `ulimit` shows them; None: no limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    numbers = {
        "open files": resource.RLIMIT_NOFILE,
        "locked memory": resource.RLIMIT_MEMLOCK,  # bytes
        "processes and threads": resource.RLIMIT_NPROC,
    }
    found = {name: resource.getrlimit(number) for name, number in numbers.items()}
    no_limit = resource.RLIM_INFINITY
    return {
        name: (None if soft == no_limit else soft, None if hard == no_limit else hard)
        for name, (soft, hard) in found.items()
    }


def compile_cache(path: str, source: str) -> CompileCache:
    """The folder of compiled programs: whether it can be written, and what it holds."""
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
    """Why no file can be made in a folder. Tried out: permissions do not tell of read-only or full disks."""
    if not folder.is_dir():
        return "not a directory"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
