"""The host, read from a file system made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_jax.tools.environment.machine import compile_cache, look, resource_limits


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
    assert found.container == "Docker"
    assert found.limits["open files"] == resource_limits()["open files"]


def test_a_machine_without_proc_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    found = look({}, tmp_path)
    assert found.cpu_model
    assert (found.memory, found.container, found.cgroup_cpus, found.cgroup_memory) == (None, "", None, None)


@pytest.mark.parametrize(
    ("files", "environ", "expected"),
    [
        ({"run/.containerenv": ""}, {}, "Podman"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes"),
        ({}, {}, ""),
    ],
)
def test_containers_are_noticed(tmp_path: Path, files: dict[str, str], environ: dict[str, str], expected: str) -> None:
    assert look(environ, build(tmp_path, files)).container == expected


def test_a_compile_cache_is_counted(tmp_path: Path) -> None:
    for name, size in (("jit_a-1-cache", 10), ("jit_a-1-atime", 8), ("jit_b-2-cache", 20)):
        (tmp_path / name).write_bytes(bytes(size))
    found = compile_cache(str(tmp_path), "the default")
    assert (found.state, found.problem) == ("2 programs, 38 B, can be written", "")
    assert len(list(tmp_path.iterdir())) == 3  # trying to write left nothing


def test_a_compile_cache_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    assert compile_cache(str(tmp_path / "a" / "b"), "").state == "is not there yet, can be made"
    assert list(tmp_path.iterdir()) == []


def test_a_compile_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    here, below = compile_cache(str(file), ""), compile_cache(str(file / "cache"), "")
    assert (here.state, here.problem) == ("cannot be written", f"{file}: not a directory")
    assert (below.state, below.problem) == ("cannot be written", f"{file}: not a directory")
    kernel = compile_cache("/proc", "")  # a folder that refuses new files, even root's
    assert (kernel.state, kernel.problem) == ("cannot be written", "/proc: No such file or directory")


def test_a_remote_compile_cache_is_left_alone() -> None:
    assert compile_cache("gs://bucket/cache", "").state == "remote, not looked at"
