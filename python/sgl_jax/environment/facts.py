"""What is known about a machine: the plain data between those who look, those who judge and those who print.

None means: could not be found out. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]
PLATFORMS: tuple[Platform, ...] = ("tpu", "gpu", "cpu")  # in the order the program prefers them

Outcome = Literal["ok", "failed", "timeout", "crashed", "not started"]
IMPORTING, INITIALISING, COMPUTING = "importing jax", "initialising", "computing"  # stages of a probe, in order


def is_gpu_plugin(package: str) -> bool:
    return package.startswith(("jax-cuda", "jax-rocm", "jax-oneapi")) and package.endswith("-plugin")


def gpu_family(plugin: str | None) -> str:
    """jax's name for the platform a GPU plugin brings."""
    return next((family for family in ("rocm", "oneapi") if plugin and family in plugin), "cuda")


@dataclass(frozen=True)
class Advice:
    """What to do: a sentence, and the command that does it where there is one."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Verdict:
    platform: Platform
    usable: bool
    summary: str  # the devices, or the reason
    advice: tuple[Advice, ...] = ()


@dataclass(frozen=True)
class Notice:
    """Something that does not stop the program and should be known."""

    text: str
    advice: tuple[Advice, ...] = ()


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


@dataclass(frozen=True)
class Holder:
    """A process that has an accelerator open."""

    pid: int
    name: str
    node: str


@dataclass(frozen=True)
class Tpus:
    """What the machine shows of TPUs without touching them."""

    chips: tuple[str, ...] = ()  # generation of each one on the PCI bus
    nodes: tuple[str, ...] = ()  # their device files
    forbidden: tuple[str, ...] = ()  # those of them this user may not open
    holders: tuple[Holder, ...] = ()
    huge_pages: str | None = None  # always, madvise or never

    @property
    def visible(self) -> bool:
        return bool(self.chips or self.nodes)


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi describes it."""

    name: str
    memory: int | None = None
    memory_used: int | None = None
    compute_capability: str = ""


@dataclass(frozen=True)
class Gpus:
    """What the machine shows of GPUs without touching them."""

    nodes: tuple[str, ...] = ()  # device files
    nvidia_on_pci: int = 0
    driver: str | None = None  # NVIDIA's, as in 580.82.07
    nvidia_smi: str = "not found"  # "ok", or why it says nothing
    gpus: tuple[Gpu, ...] = ()
    amd: bool = False

    @property
    def nvidia(self) -> bool:
        return bool(self.gpus or self.nvidia_on_pci or any("/dev/nvidia" in n or n == "/dev/dxg" for n in self.nodes))


@dataclass(frozen=True)
class Limit:
    name: str
    soft: int | None  # None: no limit
    hard: int | None
    unit: str = ""


@dataclass(frozen=True)
class Machine:
    hostname: str = "unknown"
    system: str = "unknown"
    python: str = "unknown"
    executable: str = "unknown"  # the Python that runs
    cpu_model: str = "unknown"
    cpus: int | None = None
    cpus_allowed: int | None = None  # by affinity
    instruction_sets: tuple[str, ...] = ()
    memory: int | None = None
    memory_available: int | None = None
    shared_memory: int | None = None  # size of /dev/shm
    container: str = ""  # its kind; empty: none seen
    cgroup_cpus: float | None = None  # None: not limited
    cgroup_memory: int | None = None
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Disk:
    use: str
    path: str
    free: int | None
    total: int | None


@dataclass(frozen=True)
class CompileCache:
    path: str
    source: str  # where the path comes from
    state: Literal["ready", "will be made", "remote", "not writable"]
    problem: str = ""
    programs: int = 0
    size: int = 0


@dataclass(frozen=True)
class Facts:
    """All that verdicts and notices are drawn from."""

    packages: tuple[Package, ...] = ()
    machine: Machine = field(default_factory=Machine)
    tpus: Tpus = field(default_factory=Tpus)
    gpus: Gpus = field(default_factory=Gpus)
    probes: tuple[Probe, ...] = ()
    compile_cache: CompileCache | None = None
    disks: tuple[Disk, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    tpu_library_missing: bool = False  # TPU_LIBRARY_PATH names no file
    not_found_out: tuple[str, ...] = ()  # what could not be looked at, and why

    def version(self, package: str) -> str | None:
        return next((each.version for each in self.packages if each.name == package), None)

    def probe(self, platform: Platform) -> Probe:
        unknown = Probe(platform, "not started", "nothing was tried")
        return next((each for each in self.probes if each.platform == platform), unknown)

    @property
    def gpu_plugin(self) -> str | None:
        """The installed package that brings GPUs to jax, as jax-cuda13-plugin."""
        return next((p.name for p in self.packages if p.version and is_gpu_plugin(p.name)), None)


@dataclass(frozen=True)
class Report:
    """What check_env found. The variables in `facts` are those that matter, their secrets hidden."""

    sgl_jax: str  # version
    verdicts: tuple[Verdict, ...]
    notices: tuple[Notice, ...]
    facts: Facts

    @property
    def usable(self) -> tuple[Platform, ...]:
        return tuple(verdict.platform for verdict in self.verdicts if verdict.usable)
