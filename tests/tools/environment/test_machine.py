"""The host, read from a file system made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_jax.tools.environment.machine import look


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_processor_memory_and_system_are_read(tmp_path: Path) -> None:
    root = build(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16\n",
            "proc/meminfo": "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n",
            "etc/os-release": 'NAME="X"\nPRETTY_NAME="An OS 1"\n',
            ".dockerenv": "",
        },
    )
    found = look({}, root)
    assert (found.cpu_model, found.memory) == ("A Processor", 2 << 20)
    assert found.system.startswith("An OS 1, ")
    assert found.in_container


def test_a_machine_without_proc_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    found = look({}, tmp_path)
    assert found.cpu_model
    assert (found.memory, found.in_container, found.cgroup_cpus, found.cgroup_memory) == (None, False, None, None)


@pytest.mark.parametrize(
    ("files", "environ", "expected"),
    [
        ({"run/.containerenv": ""}, {}, True),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({}, {}, False),
    ],
)
def test_containers_are_noticed(tmp_path: Path, files: dict[str, str], environ: dict[str, str], expected: bool) -> None:
    assert look(environ, build(tmp_path, files)).in_container == expected
