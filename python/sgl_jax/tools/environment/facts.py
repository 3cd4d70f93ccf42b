"""Facts about a machine: the plain data between those who look, those who judge and those who print.

None means: could not be found out. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]
PLATFORMS: tuple[Platform, ...] = ("tpu", "gpu", "cpu")  # in the order the program prefers them

Outcome = Literal["ok", "failed", "timeout", "crashed", "not started"]
IMPORTING, INITIALISING, COMPUTING = "importing jax", "initialising", "computing"  # stages of a probe, in order
GPU_PLUGIN = re.compile(r"jax-(cuda\d+|rocm\d+)-plugin")


@dataclass(frozen=True)
class Verdict:
    platform: Platform
    usable: bool
    summary: str  # the devices, or the reason
    advice: tuple[str, ...] = ()  # what to do; a command stands in a line of its own


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None  # None: not installed
    needs: str = ""  # as in ">=0.11.2"
    needed_by: str = ""
    optional: bool = False
    fits: bool = True  # false: installed in a version that `needs` excludes


@dataclass(frozen=True)
class Device:
    """As jax describes it."""

    id: int
    kind: str
    process_index: int = 0
    memory: int | None = None  # that jax may use
    memory_used: int | None = None
    coords: tuple[int, ...] | None = None  # of the chip in its slice
    core_on_chip: int | None = None
    slice_index: int | None = None


@dataclass(frozen=True)
class Probe:
    """One platform, tried out in a process of its own."""

    platform: Platform
    outcome: Outcome
    message: str = ""  # why it is not ok
    stage: str = ""  # how far it came
    seconds: float = 0.0
    jax_version: str = ""
    runtime: str = ""  # the backend's own words about its version
    process_index: int = 0
    process_count: int = 1
    devices: tuple[Device, ...] = ()  # of all processes
    log: tuple[str, ...] = ()  # warnings and errors jax logged

    @property
    def words(self) -> str:
        """The error, and before it what jax had logged: a plugin that fails is logged, and then merely missing."""
        return " ".join("; ".join((*self.log, self.message)).split())


@dataclass(frozen=True)
class Tpus:
    """Signs of TPUs that the machine shows without touching them."""

    chips: tuple[str, ...] = ()  # generation of each one on the PCI bus
    nodes: tuple[str, ...] = ()  # their device files

    @property
    def visible(self) -> bool:
        return bool(self.chips or self.nodes)


@dataclass(frozen=True)
class Gpus:
    """Signs of GPUs that the machine shows without touching them."""

    nodes: tuple[str, ...] = ()  # device files
    on_pci: int = 0  # NVIDIA's
    driver: str | None = None  # NVIDIA's, as in 580.82.07
    nvidia_smi: str = "not found"  # "ok", or why it says nothing
    names: tuple[str, ...] = ()  # as nvidia-smi lists them, with their memory

    @property
    def nvidia(self) -> bool:
        return bool(self.names or self.on_pci or any("nvidia" in node or node == "/dev/dxg" for node in self.nodes))

    @property
    def visible(self) -> bool:
        return self.nvidia or bool(self.nodes)  # /dev/kfd is AMD's


@dataclass(frozen=True)
class Machine:
    hostname: str = "unknown"
    system: str = "unknown"
    python: str = "unknown"
    cpu_model: str = "unknown"
    cpus: int | None = None  # that this process may use
    memory: int | None = None
    container: str = ""  # its kind; empty: none seen
    cgroup_cpus: float | None = None  # None: not limited
    cgroup_memory: int | None = None
    limits: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # soft and hard, as `ulimit` shows


@dataclass(frozen=True)
class CompileCache:
    path: str
    source: str  # where the path comes from
    state: str  # in words
    problem: str = ""  # why nothing can be written there
    free: int | None = None  # on its disk


@dataclass(frozen=True)
class Facts:
    """All that verdicts and notices are drawn from."""

    packages: tuple[Package, ...] = ()
    machine: Machine = field(default_factory=Machine)
    tpus: Tpus = field(default_factory=Tpus)
    gpus: Gpus = field(default_factory=Gpus)
    probes: tuple[Probe, ...] = ()
    compile_cache: CompileCache | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    not_found_out: tuple[str, ...] = ()  # what could not be looked at, and why

    def version(self, package: str) -> str | None:
        return next((each.version for each in self.packages if each.name == package), None)

    def probe(self, platform: Platform) -> Probe:
        unknown = Probe(platform, "not started", "nothing was tried")
        return next((each for each in self.probes if each.platform == platform), unknown)

    @property
    def gpu_plugin(self) -> str:
        """The installed package that brings GPUs to jax, as jax-cuda13-plugin; empty: none."""
        return next((each.name for each in self.packages if each.version and GPU_PLUGIN.fullmatch(each.name)), "")

    @property
    def gpu_name(self) -> str:
        """jax's name for the platform that the plugin brings."""
        return "rocm" if "rocm" in self.gpu_plugin else "cuda"


@dataclass(frozen=True)
class Report:
    """Everything that check_env found. The variables in `facts` are those that matter, their secrets hidden."""

    sgl_jax: str  # version
    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...]  # what does not stop the program; a command stands in a line of its own
    facts: Facts

    @property
    def usable(self) -> tuple[Platform, ...]:
        return tuple(verdict.platform for verdict in self.verdicts if verdict.usable)
