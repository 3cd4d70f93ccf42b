"""What should be known besides the verdicts."""

from __future__ import annotations

import dataclasses

import pytest
from machines import CUDA13, JAX, LIBTPU, ROCM, V5E, facts

from sgl_jax.environment.facts import CompileCache, Disk, Facts, Limit, Machine, Package, Probe
from sgl_jax.environment.notices import notices

GIB = 1 << 30


def said(given: Facts) -> list[tuple[str, list[str]]]:
    return [(each.text, [f"{a.text}: {a.command}" for a in each.advice]) for each in notices(given)]


def on(**machine: object) -> Facts:
    return facts(machine=Machine(**machine))


CASES = {
    "nothing": (facts(), []),
    "not installed as a package": (
        Facts(),
        [
            (
                "sgl_jax is not installed as a package, so what it needs is not known",
                ["in the repository: uv pip install -e python"],
            )
        ],
    ),
    "packages that are missing": (
        facts(
            packages=(
                Package("msgspec", None, ">=0.20", "sgl-jax"),
                Package("jaxlib", None, "", "jax"),
                Package("matplotlib", None, ">=3.10", "sgl-jax[bench]", optional=True),
            )
        ),
        [("not installed: msgspec, jaxlib", ['install: uv pip install "msgspec>=0.20"'])],
    ),
    "jax too old": (
        facts(packages=(dataclasses.replace(JAX, version="0.10.0", fits=False),)),
        [("jax is 0.10.0; sgl-jax needs >=0.11.2", ['install a version that fits: uv pip install "jax>=0.11.2"'])],
    ),
    "jaxlib of another jax, on a TPU": (
        facts(packages=(Package("jaxlib", "0.11.2", "==0.12.0.1", "jax", fits=False), LIBTPU)),
        [
            (
                "jaxlib is 0.11.2; jax needs ==0.12.0.1",
                ['install a version that fits: uv pip install "jax[tpu]==0.12.0.1"'],
            )
        ],
    ),
    "jaxlib of another jax, on a CPU": (
        facts(packages=(Package("jaxlib", "0.10.0", ">=0.11.2", "jax", fits=False),)),
        [
            (
                "jaxlib is 0.10.0; jax needs >=0.11.2",
                ['install a version that fits: uv pip install "jax==0.12.0.1"'],
            )
        ],
    ),
    "plugin of another jax": (
        facts(packages=(LIBTPU, dataclasses.replace(ROCM, version="0.11.2", fits=False))),
        [
            (
                "jax-rocm7-plugin is 0.11.2; jax needs ==0.12.0.1.*",
                ['install a version that fits: uv pip install "jax[rocm7-local]==0.12.0.1"'],
            )
        ],
    ),
    "cuDNN too old": (
        facts(packages=(CUDA13, Package("nvidia-cudnn-cu13", "9.1", ">=9.12", "jax-cuda13-plugin", True, False))),
        [
            (
                "nvidia-cudnn-cu13 is 9.1; jax-cuda13-plugin needs >=9.12",
                ['install a version that fits: uv pip install "jax[cuda13]==0.12.0.1"'],
            )
        ],
    ),
    "compile cache that cannot be written": (
        facts(compile_cache=CompileCache("/c", "by $X", "not writable", "Read-only file system")),
        [
            (
                "the compile cache /c cannot be written (Read-only file system): every start compiles everything",
                ["choose a folder that can be written: export JAX_COMPILATION_CACHE_DIR=..."],
            )
        ],
    ),
    "compile cache that is not there yet": (facts(compile_cache=CompileCache("/c", "by $X", "will be made")), []),
    "full disk": (
        facts(disks=(Disk("model downloads", "/d", GIB, 9 * GIB), Disk("compile cache", "/c", None, None))),
        [("only 1.0 GiB free for the model downloads (/d)", [])],
    ),
    "libtpu that is not there": (
        facts(environ={"TPU_LIBRARY_PATH": "/x.so"}, tpu_library_missing=True),
        [("TPU_LIBRARY_PATH=/x.so is no file; jax takes the installed libtpu instead", [])],
    ),
    "few open files": (
        on(limits=(Limit("open files", 1024, None),)),
        [
            (
                "at most 1024 open files; each client connection takes one",
                ["before starting the server: ulimit -n 65536"],
            )
        ],
    ),
    "few open files, and no more to be had": (
        on(limits=(Limit("open files", 1024, 1024), Limit("locked memory", 1, 1))),
        [("at most 1024 open files; each client connection takes one", [])],
    ),
    "a container with fewer CPUs than it sees": (
        on(cpus_allowed=64, cgroup_cpus=2.5),
        [("the container may use 2.5 CPUs and sees 64 CPUs: more threads than CPUs", [])],
    ),
    "a container with as many": (on(cpus_allowed=2, cgroup_cpus=2.0), []),
    "huge pages on a TPU v5e": (
        facts(tpus=dataclasses.replace(V5E, huge_pages="madvise")),
        [
            (
                "transparent huge pages are set to madvise: TPUs of this generation start slower than they can",
                ['until the next restart: sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled"'],
            )
        ],
    ),
    "huge pages on a TPU v4": (facts(tpus=dataclasses.replace(V5E, chips=("TPU v4",), huge_pages="madvise")), []),
    "what jax complained about": (
        facts(Probe("gpu", "ok", log=("cuBLAS has\n a known issue", "cuBLAS has\n a known issue"))),
        [("jax on gpu: cuBLAS has a known issue", [])],
    ),
    "what could not be looked at": (
        facts(not_found_out=("disks: OSError: x",)),
        [("could not look at disks: OSError: x", [])],
    ),
}


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES)
def test_each_situation_is_told_and_nothing_else(given: Facts, expected: list[tuple[str, list[str]]]) -> None:
    assert said(given) == expected
