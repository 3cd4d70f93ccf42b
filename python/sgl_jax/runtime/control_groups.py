"""Limits that Linux control groups put on this process, in version 1 and 2: see cgroups(7). Imports no jax.

A limit also holds for the groups inside its group, so of the process's own group and all above it the least one counts.
A file that is missing or says "max" limits nothing. `root` is the root of the file system: tests make up others.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_NO_LIMIT = 1 << 62  # version 1 writes "no limit" as the last page of 63 bits
# Files of a limit and of what is used, and the line of memory.stat with the file pages that the kernel drops first.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the bytes of memory this process may use; None: no limit."""
    return min((limit for limit, _ in _memory(root)), default=None)


def free_memory(root: Path = ROOT) -> int | None:
    """Return the bytes this process can still allocate under its limits; None: no limit."""
    return min((max(0, limit - used) for limit, used in _memory(root)), default=None)


def cpu_limit(root: Path = ROOT) -> float | None:
    """Return the CPU seconds this process may use in a second; None: no limit."""
    limits = []
    for folder in _folders("cpu", root):
        text = read(folder / "cpu.max") or f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}"
        if match := re.fullmatch(r"(\d+) ([1-9]\d*)", text):  # no limit: "max", or -1 in version 1
            limits.append(int(match[1]) / int(match[2]))
    return min(limits, default=None)


def read(path: Path) -> str:
    """Return the text of a small file; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes for each group that has a limit; pages that can be dropped are not counted as used."""
    for folder in _folders("memory", root):
        for limit_file, used_file, droppable in _MEMORY_FILES:
            limit, used = read(folder / limit_file), read(folder / used_file)
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                dropped = re.search(rf"^{droppable} (\d+)$", read(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), int(used or 0) - (int(dropped[1]) if dropped else 0)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups, its own first and the root last, for each tree with the controller."""
    tree = root / "sys/fs/cgroup"
    lines = re.findall(r"^\d+:([^:\n]*):/*(.*)$", read(root / "proc/self/cgroup") or "0::/", re.MULTILINE)
    for controllers, path in lines:  # version 2 names no controllers
        if not controllers or controller in controllers.split(","):
            # A container may be told its path on the host, which is not in its own tree: then only the root is there.
            inside = Path(path)
            for group in (inside, *inside.parents):
                yield (tree / controller if controllers else tree) / group
