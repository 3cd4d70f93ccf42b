"""Records of facts about a machine, which machine.py and others find, verdicts.py judges and environment_report.py prints.

None means that it could not be found out. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sgl_jax.observability.log import size

Platform = Literal["tpu", "gpu", "cpu"]
PLATFORMS: tuple[Platform, ...] = ("tpu", "gpu", "cpu")  # in the order the program prefers them

Outcome = Literal["ok", "failed", "timeout", "crashed", "not started"]
IMPORTING = "importing jax"  # the first stage of a probe; "initialising" and "computing" follow
GPU_PLUGIN = re.compile(r"jax-(cuda\d+|rocm\d+)-plugin")


@dataclass(frozen=True)
class Verdict:
    platform: Platform
    usable: bool
    summary: str  # the devices, or the reason
    advice: tuple[str, ...] = ()  # steps to take; a command stands in a line of its own


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
    """A device as jax describes it."""

    id: int
    kind: str
    process_index: int = 0
    memory: int | None = None  # bytes that jax may use
    memory_used: int | None = None
    coords: tuple[int, ...] | None = None  # the chip's place in its slice
    core_on_chip: int | None = None
    slice_index: int | None = None


@dataclass(frozen=True)
class Probe:
    """Result of trying one platform in a process of its own."""

    platform: Platform
    outcome: Outcome
    message: str = ""  # why it is not ok
    stage: str = IMPORTING  # how far it came
    seconds: float = 0.0
    jax_version: str = ""
    runtime: str = ""  # the backend's own words about its version
    process_index: int = 0
    process_count: int = 1
    devices: tuple[Device, ...] = ()  # devices of all processes
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
    cpus: int | None = None  # number that this process may use
    memory: int | None = None
    container: str = ""  # its kind; empty: none seen
    cgroup_cpus: float | None = None  # None: not limited
    cgroup_memory: int | None = None
    limits: dict[str, tuple[int | None, ...]] = field(default_factory=dict)  # soft and hard, as `ulimit` shows

    @property
    def processors(self) -> str:
        """The model, number and memory of the CPUs, in words."""
        cpus, memory = f"{self.cpus} CPUs" if self.cpus else "", size(self.memory) if self.memory else ""
        return ", ".join(filter(None, (self.cpu_model, cpus, memory)))


@dataclass(frozen=True)
class CompileCache:
    path: str = ""  # empty: it could not be looked at
    source: str = ""  # where the path comes from
    state: str = ""  # in words
    problem: str = ""  # why nothing can be written there
    free: int | None = None  # on its disk


@dataclass(frozen=True)
class Facts:
    """All facts that verdicts and notices depend on."""

    packages: tuple[Package, ...] = ()
    machine: Machine = Machine()
    tpus: Tpus = Tpus()
    gpus: Gpus = Gpus()
    probes: tuple[Probe, ...] = ()
    compile_cache: CompileCache = CompileCache()
    environ: Mapping[str, str] = field(default_factory=dict)
    not_found_out: tuple[str, ...] = ()  # subjects that could not be looked at, and why

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
        """The name that jax has for the plugin's platform."""
        return "rocm" if "rocm" in self.gpu_plugin else "cuda"


@dataclass(frozen=True)
class Report:
    """Everything that check_env found. `facts` has only the variables that matter, with their secrets hidden."""

    sgl_jax: str  # version
    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...]  # lines about what does not stop the program; a command stands in a line of its own
    facts: Facts

    @property
    def usable(self) -> tuple[Platform, ...]:
        return tuple(verdict.platform for verdict in self.verdicts if verdict.usable)
