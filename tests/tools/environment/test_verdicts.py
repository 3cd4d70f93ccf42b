"""Each situation has its verdict, and its advice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from machines import (
    CPU_WORKS,
    CUDA12,
    CUDA13,
    GIB,
    H200,
    JAX,
    LIBTPU,
    ROCM,
    V5E,
    V5E_DEVICES,
    facts,
    failed,
)

from sgl_jax.tools.environment.facts import (
    CompileCache,
    Device,
    Facts,
    Gpus,
    Machine,
    Outcome,
    Package,
    Platform,
    Probe,
    Verdict,
)
from sgl_jax.tools.environment.verdicts import judge, notices

JAX_TPU = 'uv pip install "jax[tpu]==0.12.0.1"'
JAX_CUDA13 = 'uv pip install "jax[cuda13]==0.12.0.1"'
TPU_CONTAINER = "in a container, pass the chips through: docker run --privileged --net=host ..."
GPU_CONTAINER = "in a container, pass the GPUs through: docker run --gpus all ..."
NOTHING = "nothing to do, unless this machine should have one"
REPORT = "if the message does not help, report it together with this text"
WHO = "see who has it (another user's process shows only to root): sudo lsof -w /dev/accel* /dev/vfio/*"
LONGER = "give it longer: --timeout 300"
UNSET = "let jax choose: unset JAX_PLATFORMS"
DOCKER = Machine(container="Docker")
NO_JAX = "ModuleNotFoundError: No module named 'jax'"


def verdict(given: Facts, platform: Platform) -> Verdict:
    return next(each for each in judge(given) if each.platform == platform)


def lines(advice: tuple[str, ...]) -> list[str]:
    return [each.replace("\n", " ") for each in advice]


def without_jax(platform: Platform, **more: object) -> Facts:
    found = facts(failed("cpu", NO_JAX, "importing jax"), failed(platform, NO_JAX, "importing jax"), **more)
    jax = Package("jax", None, ">=0.11.2", "sgl-jax")
    return dataclasses.replace(found, packages=(jax, *found.packages[1:]))


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


CHIPS, GPU = "4 x TPU v5e on the PCI bus, but ", "1 x NVIDIA H200, but "
NO_TPU = "no TPU chip is visible: no /dev/accel*, none on the PCI bus"
NO_GPU = "no GPU is visible: no /dev/nvidia*, no /dev/kfd, none on the PCI bus"
WAIT = "wait until it has ended, or stop it"
CPU_WORDS = "A Processor, 4 CPUs, 32.0 GiB"
JAX_WITHOUT_VERSION = 'install jax: uv pip install "jax{}>=0.11.2"'

HELD = (
    "RuntimeError: Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 176028. "
    "Not attempting to load libtpu.so in this process."
)
BUSY = "UNKNOWN: TPU initialization failed: open(/dev/vfio/1): Device or resource busy"
LOCK_FILE = "ABORTED: Internal error when accessing libtpu multi-process lockfile."
CUDNN = "Exception (RuntimeError: Unable to load cuDNN. Is it installed?)"
JAXLIB = Package("jaxlib", "0.10.0", ">=0.11.2,<=0.12.0.1", "jax", fits=False)

TPU_CASES = {
    "no chip": (facts(), NO_TPU, [NOTHING]),
    "no chip in a container": (facts(machine=DOCKER), NO_TPU, [TPU_CONTAINER]),
    "libtpu without a chip": (facts(packages=(LIBTPU,)), f"libtpu 0.0.50.1 is installed, but {NO_TPU}", [NOTHING]),
    "chips without libtpu": (
        facts(tpus=V5E),
        f"{CHIPS}libtpu is not installed",
        [f"install it with jax: {JAX_TPU}"],
    ),
    "chips without jax and libtpu": (
        without_jax("tpu", tpus=V5E),
        f"{CHIPS}libtpu is not installed",
        ['install it with jax: uv pip install "jax[tpu]>=0.11.2"'],
    ),
    "chips and libtpu without jax": (
        without_jax("tpu", tpus=V5E, packages=(LIBTPU,)),
        f"{CHIPS}jax cannot be imported: {NO_JAX}",
        [JAX_WITHOUT_VERSION.format("[tpu]")],
    ),
    "TPU held, libtpu says by whom": (
        on_tpu(failed("tpu", HELD)),
        f"{CHIPS}in use by process 176028, and a TPU serves one at a time",
        [WHO, WAIT],
    ),
    "TPU held, nobody says by whom": (
        on_tpu(failed("tpu", BUSY)),
        f"{CHIPS}in use by another process, and a TPU serves one at a time",
        [WHO, WAIT],
    ),
    "chips without device files": (
        on_tpu(failed("tpu", "NOT_FOUND"), tpus=dataclasses.replace(V5E, nodes=())),
        f"{CHIPS}there is no /dev/accel* and no /dev/vfio/*",
        [TPU_CONTAINER],
    ),
    "TPU does not answer": (
        on_tpu(ended("tpu", "timeout", "no answer in 90 s")),
        f"{CHIPS}jax gave no answer in 90 s while initialising",
        ["a slice of several hosts starts only when all of them do: run this on all at the same time", LONGER],
    ),
    "libtpu of another jax": (
        on_tpu(
            ended("tpu", "crashed", "killed by SIGSEGV"),
            packages=(dataclasses.replace(LIBTPU, version="0.0.52", fits=False),),
        ),
        f"{CHIPS}jax fails while initialising: killed by SIGSEGV",
        [f"versions that do not fit together: libtpu is 0.0.52, jax needs ==0.0.50.*: {JAX_TPU}"],
    ),
    "TPU behind a lock file": (
        on_tpu(failed("tpu", LOCK_FILE)),
        f"{CHIPS}jax fails while initialising: {LOCK_FILE}",
        ["if no other process uses the TPU, remove what one left: sudo rm /tmp/libtpu_lockfile"],
    ),
    "not there, and not told either": (told("cpu"), NO_TPU, [NOTHING]),
}
GPU_CASES = {
    "no GPU": (facts(), NO_GPU, [NOTHING]),
    "plugin without a GPU in a container": (
        on_gpu(failed("gpu", "AssertionError"), gpus=Gpus(), machine=DOCKER),
        f"jax-cuda13-plugin 0.12.0.1 is installed, but {NO_GPU}",
        [GPU_CONTAINER],
    ),
    "GPU without a driver": (
        facts(gpus=Gpus(on_pci=2)),
        "2 x NVIDIA GPU on the PCI bus, but no driver is loaded",
        ["install NVIDIA's, 580 or newer", GPU_CONTAINER],
    ),
    "GPU without a plugin": (facts(gpus=H200), f"{GPU}jax has no plugin for it", [f"install it: {JAX_CUDA13}"]),
    "GPU without a plugin, driver of CUDA 12": (
        facts(gpus=dataclasses.replace(H200, driver="535.183.01")),
        f"{GPU}jax has no plugin for it",
        ['install it: uv pip install "jax[cuda12]==0.12.0.1"'],
    ),
    "GPU by its device files only": (
        facts(gpus=Gpus(nodes=("/dev/nvidia0", "/dev/nvidiactl"))),
        "GPUs (/dev/nvidia0, /dev/nvidiactl), but jax has no plugin for it",
        [f"install it: {JAX_CUDA13}"],
    ),
    "AMD GPU without a plugin": (
        facts(gpus=Gpus(nodes=("/dev/kfd",))),
        "GPUs (/dev/kfd), but jax has no plugin for it",
        ['install it: uv pip install "jax[rocm7-local]==0.12.0.1"'],
    ),
    "driver too old for the plugin": (
        on_gpu(
            failed("gpu", "RuntimeError: Unable to load CUDA. Is it installed?"),
            gpus=dataclasses.replace(H200, driver="550.54.14"),
        ),
        "NVIDIA's driver is 550.54.14; jax-cuda13-plugin needs 580 or newer",
        [
            "update the driver to 580 or newer",
            'or install jax for the driver that is there: uv pip install "jax[cuda12]==0.12.0.1"',
        ],
    ),
    "driver too old for any": (
        on_gpu(packages=(CUDA12,), gpus=dataclasses.replace(H200, driver="470.239.06")),
        "NVIDIA's driver is 470.239.06; jax-cuda12-plugin needs 525 or newer",
        ["update the driver to 580 or newer"],
    ),
    "driver too old for any, without a plugin": (
        facts(gpus=dataclasses.replace(H200, driver="470.239.06")),
        "NVIDIA's driver is 470.239.06; jax needs 525 or newer",
        ["update the driver to 580 or newer"],
    ),
    "driver without a version": (
        facts(gpus=dataclasses.replace(H200, driver="[N/A]")),
        f"{GPU}jax has no plugin for it",
        [f"install it: {JAX_CUDA13}"],
    ),
    "GPU without jax": (
        without_jax("gpu", gpus=H200, packages=(CUDA13,)),
        f"{GPU}jax cannot be imported: {NO_JAX}",
        [JAX_WITHOUT_VERSION.format("[cuda13]")],
    ),
    "GPU hidden by a variable": (
        on_gpu(failed("gpu", "no supported devices"), environ={"CUDA_VISIBLE_DEVICES": ""}),
        f"{GPU}CUDA_VISIBLE_DEVICES hides it",
        ["undo it: unset CUDA_VISIBLE_DEVICES"],
    ),
    "driver that does not answer": (
        on_gpu(
            ended("gpu", "timeout", "no answer in 90 s"),
            gpus=Gpus(nodes=("/dev/nvidia0",), nvidia_smi="no answer in 20 s"),
        ),
        "GPUs (/dev/nvidia0), but nvidia-smi: no answer in 20 s",
        ["reload or reinstall the driver, or restart the machine"],
    ),
    "plugin without its libraries": (
        on_gpu(failed("gpu", "AssertionError", log=(CUDNN,))),
        f"{GPU}jax fails while initialising: {CUDNN}; AssertionError",
        [f"cuDNN cannot be loaded: install it with jax: {JAX_CUDA13}"],
    ),
    "GPU full": (
        on_gpu(failed("gpu", "RESOURCE_EXHAUSTED: out of memory", "computing")),
        f"{GPU}jax fails while computing: RESOURCE_EXHAUSTED: out of memory",
        ["its memory is taken; see by whom: nvidia-smi"],
    ),
    "gpu told for all families": (
        told("gpu", Probe("gpu", "ok", devices=(Device(0, "NVIDIA H200"),)), packages=(CUDA13,), gpus=H200),
        "works (1 x NVIDIA H200), but jax fails with JAX_PLATFORMS=gpu: it takes gpu for CUDA and ROCm at once; write cuda",
        [UNSET],
    ),
    "the other family of GPUs told": (
        told("cuda", Probe("gpu", "ok", devices=(Device(0, "gfx942"),)), packages=(ROCM,), gpus=H200),
        "works (1 x gfx942), but jax fails with JAX_PLATFORMS=cuda: cuda does not work",
        [UNSET],
    ),
}
CPU_CASES = {
    "no jax": (without_jax("cpu"), f"jax cannot be imported: {NO_JAX}", [JAX_WITHOUT_VERSION.format("")]),
    "jax that cannot be imported, with another jaxlib": (
        facts(failed("cpu", "ImportError: jaxlib is version 0.10.0", "importing jax"), packages=(JAXLIB,)),
        "jax cannot be imported: ImportError: jaxlib is version 0.10.0",
        [
            'reinstall jax: uv pip install "jax==0.12.0.1"',
            "versions that do not fit together: jaxlib is 0.10.0, jax needs >=0.11.2,<=0.12.0.1: "
            'uv pip install "jax==0.12.0.1"',
        ],
    ),
    "CPU without AVX": (
        facts(ended("cpu", "crashed", "killed by SIGILL", "importing jax")),
        "jax fails while importing jax: killed by SIGILL",
        ["this CPU lacks instructions that jaxlib is built with: use another machine"],
    ),
    "out of memory": (
        facts(ended("cpu", "crashed", "killed by SIGKILL")),
        "jax fails while initialising: killed by SIGKILL",
        ["most often for lack of memory: free some, or raise the container's limit"],
    ),
    "CPU does not answer": (
        facts(ended("cpu", "timeout", "no answer in 5 s", "importing jax")),
        "jax gave no answer in 5 s while importing jax",
        [LONGER],
    ),
    "process that did not start": (
        facts(ended("cpu", "not started", "the process could not be started")),
        "it was not tried: the process could not be started",
        [REPORT],
    ),
    "another platform is told": (
        told("tpu", Probe("tpu", "ok", devices=V5E_DEVICES), tpus=V5E),
        f"works ({CPU_WORDS}), but JAX_PLATFORMS=tpu keeps jax from it",
        [UNSET],
    ),
    "a platform that fails is told, too": (
        told("tpu, cpu"),
        f"works ({CPU_WORDS}), but jax fails with JAX_PLATFORMS=tpu, cpu: tpu does not work",
        [UNSET],
    ),
    "a platform that nobody knows": (
        told("cuda12,cpu"),
        f"works ({CPU_WORDS}), but jax fails with JAX_PLATFORMS=cuda12,cpu: it knows no platform cuda12",
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
    assert (found.usable, found.summary, lines(found.advice)) == (False, summary, advice)


MANY_TPUS = tuple(Device(id, "TPU v3", id // 4, 8 * GIB, 0, (id // 2 % 2, 0, 0), id % 2, id // 4) for id in range(8))
H200_DEVICE = Device(0, "NVIDIA H200", memory=105 * GIB)
USABLE = {
    "CPU": ("cpu", facts(), CPU_WORDS),
    "CPU, told": ("cpu", told("cpu"), CPU_WORDS),
    "CPU, with CUDA told where there is none": ("cpu", told("cuda,cpu"), CPU_WORDS),
    "TPU": (
        "tpu",
        told("tpu,cpu", Probe("tpu", "ok", devices=V5E_DEVICES), tpus=V5E),
        "4 x TPU v5 lite, 16.0 GiB for jax each, 2x2x1 chips",
    ),
    "TPU that nothing but its probe shows": (
        "tpu",
        facts(Probe("tpu", "ok", devices=V5E_DEVICES[:1])),
        "1 x TPU v5 lite, 16.0 GiB for jax, 1x1x1 chips",
    ),
    "TPU of several hosts, slices and cores": (
        "tpu",
        facts(Probe("tpu", "ok", process_count=2, devices=MANY_TPUS)),
        "8 x TPU v3, 8.0 GiB for jax each, 2x1x1 chips of 2 cores, 2 slices, 2 processes",
    ),
    "GPU": (
        "gpu",
        told("cuda", Probe("gpu", "ok", devices=(H200_DEVICE,)), packages=(CUDA13,), gpus=H200),
        "1 x NVIDIA H200, 105.0 GiB for jax",
    ),
}


@pytest.mark.parametrize(("platform", "given", "summary"), USABLE.values(), ids=USABLE)
def test_usable(platform: Platform, given: Facts, summary: str) -> None:
    assert verdict(given, platform) == Verdict(platform, True, summary)


def test_a_verdict_for_each_platform_whatever_is_known() -> None:
    assert [(v.platform, v.usable) for v in judge(Facts())] == [("tpu", False), ("gpu", False), ("cpu", False)]
    assert [(v.platform, v.usable) for v in judge(facts(CPU_WORKS))] == [("tpu", False), ("gpu", False), ("cpu", True)]


NOTICES = {
    "nothing": (facts(), []),
    "not installed as a package": (
        Facts(),
        ["sgl_jax is not installed, or not with its packages; in the repository:\nuv pip install -e python"],
    ),
    "packages that are missing": (
        facts(
            packages=(
                Package("msgspec", None, ">=0.20", "sgl-jax"),
                Package("jaxlib", None, "", "jax"),
                Package("matplotlib", None, ">=3.10", "sgl-jax", optional=True),
            )
        ),
        ['not installed: msgspec, jaxlib\nuv pip install "msgspec>=0.20"'],
    ),
    "jax too old": (
        facts(packages=(dataclasses.replace(JAX, version="0.10.0", fits=False),)),
        ['jax is 0.10.0; sgl-jax needs >=0.11.2\nuv pip install "jax>=0.11.2"'],
    ),
    "jaxlib of another jax, on a TPU": (
        facts(packages=(Package("jaxlib", "0.11.2", "==0.12.0.1", "jax", fits=False), LIBTPU)),
        [f"jaxlib is 0.11.2; jax needs ==0.12.0.1\n{JAX_TPU}"],
    ),
    "jaxlib of another jax, on a CPU": (
        facts(packages=(Package("jaxlib", "0.10.0", ">=0.11.2", "jax", fits=False),)),
        ['jaxlib is 0.10.0; jax needs >=0.11.2\nuv pip install "jax==0.12.0.1"'],
    ),
    "cuDNN too old": (
        facts(packages=(CUDA13, Package("nvidia-cudnn-cu13", "9.1", ">=9.12", "jax-cuda13-plugin", True, False))),
        [f"nvidia-cudnn-cu13 is 9.1; jax-cuda13-plugin needs >=9.12\n{JAX_CUDA13}"],
    ),
    "compile cache that cannot be written": (
        facts(compile_cache=CompileCache("/c", "by $X", "cannot be written", "Read-only file system")),
        [
            "the compile cache /c cannot be written (Read-only file system): every start compiles everything; "
            "choose another\nexport JAX_COMPILATION_CACHE_DIR=..."
        ],
    ),
    "compile cache on a full disk": (
        facts(compile_cache=CompileCache("/c", "by $X", "is not there yet", free=GIB)),
        ["only 1.0 GiB free for the compile cache (/c)"],
    ),
    "few open files": (
        facts(machine=Machine(limits={"open files": (1024, None)})),
        ["at most 1024 open files; each client connection takes one\nulimit -n 65536"],
    ),
    "few open files, and no more to be had": (
        facts(machine=Machine(limits={"open files": (1024, 1024), "locked memory": (1, 1)})),
        ["at most 1024 open files; each client connection takes one"],
    ),
    "a container with fewer CPUs than it sees": (
        facts(machine=Machine(cpus=64, cgroup_cpus=2.5)),
        ["the container may use 2.5 CPUs and sees 64: more threads than CPUs"],
    ),
    "a container with as many": (facts(machine=Machine(cpus=2, cgroup_cpus=2.0)), []),
    "what could not be looked at": (
        facts(not_found_out=("disks: OSError: x",)),
        ["could not look at disks: OSError: x"],
    ),
}


@pytest.mark.parametrize(("given", "expected"), NOTICES.values(), ids=NOTICES)
def test_what_should_be_known_is_told_and_nothing_else(given: Facts, expected: list[str]) -> None:
    assert list(notices(given)) == expected
