"""Limits of control groups, in trees made for the test, as the server and check_env see them."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from sgl_jax.runtime import control_groups, memory
from sgl_jax.tools.environment import machine

SLICE = {
    "proc/self/cgroup": "0::/system.slice/serve.service\n",
    "system.slice/memory.max": "4096",
    "system.slice/memory.current": "3000",
    "system.slice/cpu.max": "250000 100000",
    "system.slice/serve.service/memory.max": "max",
    "system.slice/serve.service/cpu.max": "max 100000",
}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "cpu.max": "max 100000",
    "memory.max": "9000",
    "memory.current": "8500",
    "a/cpu.max": "250000 100000",
    "a/memory.max": "4096",
    "a/memory.current": "3000",
    "a/memory.stat": "anon 1000\ninactive_file 1500\nactive_file 500\n",
    "a/b/cpu.max": "300000 100000",
    "a/b/memory.max": "8192",
    "a/b/memory.current": "2000",
}
V1 = {
    "proc/self/cgroup": "4:memory:/a/b\n2:cpu,cpuacct:/c\n1:name=systemd:/a/b\n0::/\n",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/a/memory.limit_in_bytes": "4096",
    "memory/a/memory.usage_in_bytes": "3000",
    "memory/a/memory.stat": "inactive_file 7\ntotal_inactive_file 1500\n",
    "memory/a/b/memory.limit_in_bytes": "9223372036854771712",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "cpu/c/cpu.cfs_quota_us": "50000",
    "cpu/c/cpu.cfs_period_us": "100000",
}
# files under /sys/fs/cgroup -> (limit, free, CPUs)
TREES = {
    "no files": ({}, (None, None, None)),
    "a root without limits": ({"memory.max": "max", "cpu.max": "max 100000"}, (None, None, None)),
    "a slice above the service, with a limit": (SLICE, (4096, 1096, 2.5)),
    "limits at every level": (V2, (4096, 500, 2.5)),
    "version 1": (V1, (4096, 2596, 0.5)),
    "the host's path in a container": (
        {"proc/self/cgroup": "0::/of/the/host", "memory.max": "100", "cpu.max": "50000 100000"},
        (100, 100, 0.5),
    ),
    "the host's path in a container, version 1": (
        {"proc/self/cgroup": "4:memory:/docker/abc", "memory/memory.limit_in_bytes": "100"},
        (100, 100, None),
    ),
    "lines that nobody knows": (
        {"proc/self/cgroup": "nothing\n0::/a\n1:x\n", "a/memory.max": "100", "a/cpu.max": "many 0"},
        (100, 100, None),
    ),
    "more used than allowed": ({"memory.max": "100", "memory.current": "120"}, (100, 0, None)),
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / ("" if name.startswith("proc/") else "sys/fs/cgroup") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(("files", "expected"), TREES.values(), ids=TREES)
def test_the_least_limit_of_the_group_and_all_above_counts(tmp_path: Path, files: dict[str, str], expected) -> None:
    root = build(tmp_path, files)
    found = control_groups.memory_limit(root), control_groups.free_memory(root), control_groups.cpu_limit(root)
    assert found == expected


@pytest.mark.parametrize("files", [SLICE, V2, V1], ids=["slice", "version 2", "version 1"])
def test_the_server_plans_with_the_limits_that_check_env_reports(tmp_path: Path, files: dict[str, str]) -> None:
    root = build(tmp_path, files)
    cpu = jax.devices("cpu")[0]
    assert machine.look({}, root).cgroup_memory == 4096
    assert memory.device_memory(cpu, root) == memory.free_memory(cpu, root) == control_groups.free_memory(root)
    assert machine.look({}, root).cgroup_cpus == control_groups.cpu_limit(root)
    assert memory.device_memory(cpu, tmp_path / "none") > 1 << 20
