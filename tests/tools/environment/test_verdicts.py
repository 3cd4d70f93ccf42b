"""Each situation has its verdict, and its advice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from machines import (
    CUDA12,
    CUDA13,
    GIB,
    H200,
    H200_WORKS,
    JAX,
    LIBTPU,
    OURS,
    V5E,
    V5E_WORKS,
    facts,
    failed,
)

from messages import says
from sgl_jax.tools.environment.facts import Facts, Machine, Outcome, Package, Platform, Probe, Signs, Verdict
from sgl_jax.tools.environment.verdicts import judge, notices

JAX_TPU = 'uv pip install "jax[tpu]==0.12.0.1"'
JAX_CUDA13 = 'uv pip install "jax[cuda13]==0.12.0.1"'
TPU_CONTAINER = "docker run --privileged --net=host"
GPU_CONTAINER = "docker run --gpus all"
NOTHING = "nothing to do"
REPORT = "report"
WHO = "sudo lsof -w /dev/accel* /dev/vfio/*"
UNSET = "unset JAX_PLATFORMS"
DOCKER = Machine(in_container=True)
NO_JAX = "ModuleNotFoundError: No module named 'jax'"


def verdict(given: Facts, platform: Platform) -> Verdict:
    return next(each for each in judge(given) if each.platform == platform)


def lines(advice: tuple[str, ...]) -> list[str]:
    return [each.replace("\n", " ") for each in advice]


def without_jax(platform: Platform, **more: object) -> Facts:
    found = facts(failed("cpu", NO_JAX, "importing jax"), failed(platform, NO_JAX, "importing jax"), **more)
    jax = Package("jax", None, ">=0.11.2")
    return dataclasses.replace(found, packages=(OURS, jax, *found.packages[2:]))


def on_tpu(*probes: Probe, **more: Any) -> Facts:
    """A machine with four chips and libtpu."""
    return facts(*probes, **{"packages": (LIBTPU,), "tpus": V5E, **more})


def on_gpu(*probes: Probe, **more: Any) -> Facts:
    """A machine with one GPU and jax's plugin for it."""
    return facts(*probes, **{"packages": (CUDA13,), "gpus": H200, **more})


def ended(platform: Platform, outcome: Outcome, message: str, stage: str = "initialising") -> Probe:
    return Probe(platform, outcome, message, stage)


def told(value: str, *probes: Probe, **more: Any) -> Facts:
    return facts(*probes, environ={"JAX_PLATFORMS": value}, **more)


CHIPS, GPU = "4 x TPU v5e", "1 x NVIDIA H200"
NO_TPU = "TPU … /dev/accel* … PCI"
NO_GPU = "GPU … /dev/nvidia* … PCI"
CPU_WORDS = "A Processor, 4 CPUs, 32.0 GiB"
JAX_NEW_ENOUGH = 'uv pip install "jax{}>=0.11.2"'

HELD = (
    "RuntimeError: Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 176028. "
    "Not attempting to load libtpu.so in this process."
)
BUSY = "UNKNOWN: TPU initialization failed: open(/dev/vfio/1): Device or resource busy"
LOCK_FILE = "ABORTED: Internal error when accessing libtpu multi-process lockfile."
CUDNN = "RuntimeError: Unable to load cuDNN. Is it installed?"
INSUFFICIENT = "INTERNAL: CUDA driver version is insufficient for CUDA runtime version"
JAXLIB = Package("jaxlib", "0.10.0", "<=0.12.0.1,>=0.11.2", fits=False)

TPU_CASES = {
    "no chip": (facts(), NO_TPU, [NOTHING]),
    "no chip in a container": (facts(machine=DOCKER), NO_TPU, [TPU_CONTAINER]),
    "libtpu without a chip": (facts(packages=(LIBTPU,)), f"libtpu 0.0.50.1 … {NO_TPU}", [NOTHING]),
    "chips without libtpu": (
        facts(tpus=V5E),
        f"{CHIPS} … libtpu … not installed",
        [JAX_TPU],
    ),
    "chips without jax and libtpu": (
        without_jax("tpu", tpus=V5E),
        f"{CHIPS} … libtpu … not installed",
        [JAX_NEW_ENOUGH.format("[tpu]")],
    ),
    "chips and libtpu without jax": (
        without_jax("tpu", tpus=V5E, packages=(LIBTPU,)),
        f"{CHIPS} … {NO_JAX}",
        [JAX_NEW_ENOUGH.format("[tpu]")],
    ),
    "TPU held, libtpu says by whom": (
        on_tpu(failed("tpu", HELD)),
        f"{CHIPS} … in use … 176028",
        [WHO, "wait"],
    ),
    "TPU held, nobody says by whom": (
        on_tpu(failed("tpu", BUSY)),
        f"{CHIPS} … in use … another process",
        [WHO, "wait"],
    ),
    "chips without device files": (
        on_tpu(failed("tpu", "NOT_FOUND"), tpus=dataclasses.replace(V5E, nodes=())),
        f"{CHIPS} … no /dev/accel* … /dev/vfio/*",
        [TPU_CONTAINER],
    ),
    "TPU does not answer": (
        on_tpu(ended("tpu", "timeout", "no answer in 90 s")),
        f"{CHIPS} … 90 s … initialising",
        ["several hosts", "--timeout 300"],
    ),
    "libtpu of another jax": (
        on_tpu(
            ended("tpu", "crashed", "killed by SIGSEGV"),
            packages=(dataclasses.replace(LIBTPU, version="0.0.52", fits=False),),
        ),
        f"{CHIPS} … initialising: killed by SIGSEGV",
        ['libtpu … 0.0.52 … ==0.0.50.* … uv pip install "libtpu==0.0.50.*"'],
    ),
    "TPU behind a lock file": (
        on_tpu(failed("tpu", LOCK_FILE)),
        f"{CHIPS} … initialising: {LOCK_FILE}",
        ["sudo rm /tmp/libtpu_lockfile"],
    ),
    "not there, and not told either": (told("cpu"), NO_TPU, [NOTHING]),
}
GPU_CASES = {
    "no GPU": (facts(), NO_GPU, [NOTHING]),
    "plugin without a GPU in a container": (
        on_gpu(failed("gpu", "AssertionError"), gpus=Signs(), machine=DOCKER),
        f"jax-cuda13-plugin 0.12.0.1 … {NO_GPU}",
        [GPU_CONTAINER],
    ),
    "GPU without a driver": (
        facts(gpus=Signs(("NVIDIA GPU",) * 2)),
        "2 x NVIDIA GPU … no driver",
        ["580", GPU_CONTAINER],
    ),
    "GPU without a plugin": (facts(gpus=H200), f"{GPU} … no plugin", [f"cuda12 … 580 … {JAX_CUDA13}"]),
    "GPU by its device files only": (
        facts(gpus=Signs(nodes=("/dev/nvidia0", "/dev/nvidiactl"))),
        "/dev/nvidia0, /dev/nvidiactl … no plugin",
        [JAX_CUDA13],
    ),
    "driver too old for the plugin": (
        on_gpu(failed("gpu", INSUFFICIENT)),
        f"{GPU} … initialising: {INSUFFICIENT}",
        ["driver … 580 … jax[cuda12]"],
    ),
    "GPU without jax": (
        without_jax("gpu", gpus=H200, packages=(CUDA13,)),
        f"{GPU} … {NO_JAX}",
        [JAX_NEW_ENOUGH.format("[cuda13]")],
    ),
    "GPU hidden by a variable": (
        on_gpu(failed("gpu", "no supported devices"), environ={"CUDA_VISIBLE_DEVICES": ""}),
        f"{GPU} … CUDA_VISIBLE_DEVICES",
        ["unset CUDA_VISIBLE_DEVICES"],
    ),
    "GPU that does not answer": (
        on_gpu(ended("gpu", "timeout", "no answer in 90 s")),
        f"{GPU} … 90 s … initialising",
        ["--timeout 300"],
    ),
    "plugin without its libraries": (
        on_gpu(failed("gpu", "AssertionError", log=(CUDNN,))),
        f"{GPU} … initialising … {CUDNN} … AssertionError",
        [f"cuDNN … {JAX_CUDA13}"],
    ),
    "plugin of CUDA 12 without its libraries": (
        on_gpu(failed("gpu", CUDNN), packages=(CUDA12,)),
        f"{GPU} … initialising … {CUDNN}",
        ['cuDNN … uv pip install "jax[cuda12]==0.12.0.1"'],
    ),
    "GPU full": (
        on_gpu(failed("gpu", "RESOURCE_EXHAUSTED: out of memory", "computing")),
        f"{GPU} … computing: RESOURCE_EXHAUSTED: out of memory",
        ["memory … nvidia-smi"],
    ),
    "jax is told of another platform": (
        told("cpu", H200_WORKS, packages=(CUDA13,), gpus=H200),
        "works (1 x NVIDIA H200, 105.0 GiB for jax) … JAX_PLATFORMS=cpu",
        [UNSET],
    ),
}
CPU_CASES = {
    "no jax": (without_jax("cpu"), NO_JAX, [JAX_NEW_ENOUGH.format("")]),
    "jax that cannot be imported, with another jaxlib": (
        facts(failed("cpu", "ImportError: jaxlib is version 0.10.0", "importing jax"), packages=(JAXLIB,)),
        "ImportError: jaxlib is version 0.10.0",
        [
            'uv pip install "jax==0.12.0.1"',
            'jaxlib … 0.10.0 … <=0.12.0.1,>=0.11.2 … uv pip install "jaxlib<=0.12.0.1,>=0.11.2"',
        ],
    ),
    "CPU without AVX": (
        facts(ended("cpu", "crashed", "killed by SIGILL", "importing jax")),
        "importing jax: killed by SIGILL",
        ["CPU … jaxlib"],
    ),
    "out of memory": (
        facts(ended("cpu", "crashed", "killed by SIGKILL")),
        "initialising: killed by SIGKILL",
        ["memory"],
    ),
    "CPU does not answer": (
        facts(ended("cpu", "timeout", "no answer in 5 s", "importing jax")),
        "5 s … importing jax",
        ["--timeout 300"],
    ),
    "process that did not start": (
        facts(ended("cpu", "not started", "the process could not be started")),
        "not tried: the process could not be started",
        [REPORT],
    ),
    "another platform is told": (
        told("tpu", V5E_WORKS, tpus=V5E),
        f"works ({CPU_WORDS}) … JAX_PLATFORMS=tpu",
        [UNSET],
    ),
}
UNUSABLE = {
    f"{platform}: {name}": (platform, *case)
    for platform, cases in (("tpu", TPU_CASES), ("gpu", GPU_CASES), ("cpu", CPU_CASES))
    for name, case in cases.items()
}


@pytest.mark.parametrize(("platform", "given", "summary", "advice"), UNUSABLE.values(), ids=UNUSABLE)
def test_why_not_and_what_to_do(platform: Platform, given: Facts, summary: str, advice: list[str]) -> None:
    found = verdict(given, platform)
    assert not found.usable
    assert says(found.summary, summary)
    assert [says(line, pinned) for line, pinned in zip(lines(found.advice), advice, strict=True)] == [True] * len(
        advice
    )


USABLE = {
    "CPU": ("cpu", facts(), CPU_WORDS),
    "CPU, told": ("cpu", told("cpu"), CPU_WORDS),
    "TPU": ("tpu", told("tpu, cpu", V5E_WORKS, tpus=V5E), "4 x TPU v5 lite, 16.0 GiB for jax each"),
    "TPU that nothing but its probe shows": (
        "tpu",
        facts(dataclasses.replace(V5E_WORKS, devices=("TPU v5 lite",))),
        "1 x TPU v5 lite, 16.0 GiB for jax",
    ),
    "TPU of several hosts": (
        "tpu",
        facts(Probe("tpu", "ok", process_count=2, devices=("TPU v3",) * 8, memory=8 * GIB)),
        "8 x TPU v3, 8.0 GiB for jax each, 2 processes",
    ),
    "GPU": (
        "gpu",
        told("cuda", H200_WORKS, packages=(CUDA13,), gpus=H200),
        "1 x NVIDIA H200, 105.0 GiB for jax",
    ),
}


@pytest.mark.parametrize(("platform", "given", "summary"), USABLE.values(), ids=USABLE)
def test_usable(platform: Platform, given: Facts, summary: str) -> None:
    assert verdict(given, platform) == Verdict(platform, True, summary)


def test_a_verdict_for_each_platform_whatever_is_known() -> None:
    assert [(v.platform, v.usable) for v in judge(Facts())] == [("tpu", False), ("gpu", False), ("cpu", False)]
    assert [(v.platform, v.usable) for v in judge(facts())] == [("tpu", False), ("gpu", False), ("cpu", True)]


NOTICES = {
    "nothing": (facts(), []),
    "not installed as a package": (
        Facts(),
        ["sgl_jax … not installed … \nuv pip install -e python"],
    ),
    "packages that are missing": (
        facts(packages=(Package("msgspec", None, ">=0.20"), Package("jaxlib", None))),
        ['msgspec, jaxlib\nuv pip install "msgspec>=0.20" "jaxlib"'],
    ),
    "jax too old": (
        dataclasses.replace(facts(), packages=(OURS, dataclasses.replace(JAX, version="0.10.0", fits=False))),
        ['jax … 0.10.0 … >=0.11.2 … \nuv pip install "jax>=0.11.2"'],
    ),
    "libtpu of another jax": (
        facts(packages=(dataclasses.replace(LIBTPU, version="0.0.52", fits=False),)),
        ['libtpu … 0.0.52 … ==0.0.50.* … \nuv pip install "libtpu==0.0.50.*"'],
    ),
}


@pytest.mark.parametrize(("given", "expected"), NOTICES.values(), ids=NOTICES)
def test_what_should_be_known_is_told_and_nothing_else(given: Facts, expected: list[str]) -> None:
    told = notices(given)
    assert [says(notice, pinned) for notice, pinned in zip(told, expected, strict=True)] == [True] * len(expected)
    assert [len(notice.splitlines()) for notice in told] == [len(pinned.splitlines()) for pinned in expected]
