"""Records of facts about a machine, which machine.py and others find, verdicts.py judges and environment_report.py prints.

None means that it could not be found out. Sizes are in bytes, times in seconds.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sgl_jax.observability.log import size

Platform = Literal["tpu", "gpu", "cpu"]
PLATFORMS: tuple[Platform, ...] = ("tpu", "gpu", "cpu")  # in the order the program prefers them

Outcome = Literal["ok", "failed", "timeout", "crashed", "not started"]
IMPORTING = "importing jax"  # the first stage of a probe; "initialising" and "computing" follow
GPU_PLUGIN = re.compile(r"jax-cuda\d+-plugin")


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
    fits: bool = True  # false: installed in a version that `needs` excludes


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
    devices: tuple[str, ...] = ()  # the kind of each one, of all processes
    memory: int | None = None  # bytes of the first device that jax may use
    process_count: int = 1
    log: tuple[str, ...] = ()  # warnings and errors jax logged

    @property
    def words(self) -> str:
        """The error, and before it what jax had logged: a plugin that fails is logged, and then merely missing."""
        return " ".join("; ".join((*self.log, self.message)).split())


@dataclass(frozen=True)
class Signs:
    """Signs of TPUs, or of NVIDIA GPUs, that the machine shows without touching them."""

    names: tuple[str, ...] = ()  # the kind of each one that the PCI bus or the driver shows
    nodes: tuple[str, ...] = ()  # their device files
    driver: str = ""  # version of NVIDIA's, as in 580.82.07; empty: none is loaded

    @property
    def visible(self) -> bool:
        return bool(self.names or self.nodes)

    @property
    def words(self) -> str:
        return kinds(self.names) if self.names else ", ".join(self.nodes) or "none"


@dataclass(frozen=True)
class Machine:
    hostname: str = "unknown"
    system: str = "unknown"
    python: str = "unknown"
    cpu_model: str = "unknown"
    cpus: int | None = None  # number that this process may use
    memory: int | None = None
    in_container: bool = False  # whether one is seen
    cgroup_cpus: float | None = None  # None: not limited
    cgroup_memory: int | None = None

    @property
    def processors(self) -> str:
        """The model, number and memory of the CPUs, in words."""
        cpus, memory = f"{self.cpus} CPUs" if self.cpus else "", size(self.memory) if self.memory else ""
        return ", ".join(filter(None, (self.cpu_model, cpus, memory)))


@dataclass(frozen=True)
class Facts:
    """All facts that verdicts and notices depend on."""

    packages: tuple[Package, ...] = ()
    machine: Machine = Machine()
    tpus: Signs = Signs()
    gpus: Signs = Signs()
    probes: tuple[Probe, ...] = tuple(Probe(each, "not started", "nothing was tried") for each in PLATFORMS)
    environ: Mapping[str, str] = field(default_factory=dict)

    def version(self, package: str) -> str | None:
        return next((each.version for each in self.packages if each.name == package), None)

    def probe(self, platform: Platform) -> Probe:
        return next(each for each in self.probes if each.platform == platform)

    @property
    def gpu_plugin(self) -> str:
        """The installed package that brings GPUs to jax, as jax-cuda13-plugin; empty: none."""
        return next((each.name for each in self.packages if each.version and GPU_PLUGIN.fullmatch(each.name)), "")


def kinds(names: Iterable[str]) -> str:
    """Count equal names: `4 x TPU v5e and 1 x TPU v4`."""
    return " and ".join(f"{number} x {name}" for name, number in sorted(Counter(names).items()))


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
