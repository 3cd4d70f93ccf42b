"""Topologies of accelerators that need not be here: the sizes and rates of a "v6e-4", and its devices to compile for.

The figures are the makers' (cloud.google.com/tpu/docs, nvidia.com), per JAX device: a v5p chip is one device, a v7x chip
is two. A TPU's memory is the part that its compiler lets a program use. A TPU makes a float32 product of six bfloat16 ones.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Literal

import jax
import numpy as np

_GIB = 1 << 30
# Latency of a hop between neighbouring chips, as https://jax-ml.github.io/scaling-book/sharding gives it.
_HOP_S = 1e-6


class NoSuchTopology(ValueError):
    """The name is of no topology, or of none that can be compiled for on this machine."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Kind of accelerator. Rates are of one JAX device; links are between chips."""

    kind: str
    devices_per_chip: int
    memory_bytes: int  # memory that a program may use
    bytes_per_s: float  # reading memory
    flops: dict[str, float]  # multiplications and additions per second of matrix products, by dtype
    link_bytes_per_s: float  # one link, one way
    grid: Literal["2d", "3d", "all"]  # how chips are linked: a mesh or torus, or each with every other
    multipliers: int = 0  # in a device's matrix units; each multiplies once a cycle; 0: not known

    @property
    def clock_hz(self) -> float:
        """The clock at which the matrix units reach their rate."""
        return self.flops["bfloat16"] / (2 * self.multipliers)

    @property
    def platform(self) -> Literal["tpu", "gpu"]:
        return "gpu" if self.grid == "all" else "tpu"


CHIPS = {
    "v5e": Chip(
        "TPU v5e", 1, int(15.75 * _GIB), 819e9, {"bfloat16": 197e12, "float32": 32.8e12}, 50e9, "2d", 4 * 128**2
    ),
    "v5p": Chip(
        "TPU v5p", 1, int(95.73 * _GIB), 2765e9, {"bfloat16": 459e12, "float32": 76.5e12}, 100e9, "3d", 8 * 128**2
    ),
    "v6e": Chip(
        "TPU v6e", 1, int(31.24 * _GIB), 1640e9, {"bfloat16": 918e12, "float32": 153e12}, 100e9, "2d", 4 * 256**2
    ),
    "v7x": Chip(
        "TPU7x core", 2, int(94.74 * _GIB), 3690e9, {"bfloat16": 1153e12, "float32": 192e12}, 100e9, "3d", 4 * 256**2
    ),
    "h100": Chip("NVIDIA H100 SXM", 1, 80 * 10**9, 3350e9, {"bfloat16": 989e12, "float32": 67e12}, 450e9, "all"),
    "h200": Chip("NVIDIA H200 SXM", 1, 141 * 10**9, 4800e9, {"bfloat16": 989e12, "float32": 67e12}, 450e9, "all"),
}

# Number of chips -> the grid they form. Google rents these and no others (half a host of 2x2 included).
_GRIDS = {
    "2d": {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    "3d": {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)},
    "all": {n: (n,) for n in (1, 2, 4, 8)},
}
_LIBTPU_NAMES = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind with the links between them."""

    name: str  # v6e-4
    chip: Chip
    grid: tuple[int, ...]  # chips along each axis

    @property
    def num_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def links(self) -> int:
        """The least number of links that a chip has: two on an axis that closes to a ring, one on a shorter axis."""
        if self.chip.grid == "all":
            return int(self.num_chips > 1)
        ring = 16 if self.chip.grid == "2d" else 4
        return sum(0 if n == 1 else 2 if n % ring == 0 else 1 for n in self.grid)

    def all_reduce_bytes_per_s(self, devices: int) -> float:
        """Return how fast an array is summed over this many devices at best: by a ring all-reduce, in which each of n chips
        sends 2 (n - 1) / n of it (Patarasuk and Yuan, 2009). Transfers between devices of one chip are taken as free.
        """
        chips = -(-devices // self.chip.devices_per_chip)
        return self.links * self.chip.link_bytes_per_s * chips / (2 * (chips - 1)) if chips > 1 else math.inf

    def all_reduce_latency_s(self, devices: int) -> float:
        """Return how long a sum over this many devices takes whatever its size: data go half around the ring of each axis, and
        back as sums."""
        if devices <= self.chip.devices_per_chip:
            return 0.0
        chips = -(-devices // self.chip.devices_per_chip)
        grid = _GRIDS[self.chip.grid].get(chips, self.grid)
        return 2 * _HOP_S * (1 if self.chip.grid == "all" else sum(n // 2 for n in grid))


def parse(name: str) -> Topology:
    """Read a name: "v6e-4" is four chips. Raises NoSuchTopology, saying which names there are."""
    match = re.fullmatch(r"(\w+)-(\d+)", name)
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        kinds = ", ".join(f"{kind}-N" for kind in CHIPS)
        raise NoSuchTopology(f"{name} is no topology; write cpu, gpu, or a kind and a number of chips: {kinds}")
    if (grid := _GRIDS[chip.grid].get(int(match[2]))) is None:
        raise NoSuchTopology(f"{name}: there are {match[1]} in {', '.join(map(str, _GRIDS[chip.grid]))} chips")
    return Topology(name, chip, grid)


def larger(topology: Topology) -> list[Topology]:
    """Return the topologies with more chips of the same kind, smallest first."""
    kind = topology.name.partition("-")[0]
    return [parse(f"{kind}-{n}") for n in _GRIDS[topology.chip.grid] if n > topology.num_chips]


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Return devices to compile programs for, which cannot run on them. Needs libtpu and set_tpu_environment().

    Raises NoSuchTopology without libtpu, or for a kind that it does not compile for.
    """
    if topology.chip.platform != "tpu":
        raise NoSuchTopology(f"{topology.name}: compiling for a GPU needs that GPU; --plan needs none")
    if importlib.util.find_spec("libtpu") is None:
        raise NoSuchTopology(f"{topology.name}: compiling for a TPU needs libtpu; `pip install libtpu`, or use --plan")
    from jax.experimental import topologies

    kind = topology.name.partition("-")[0]
    name = f"{_LIBTPU_NAMES[kind]}:{'x'.join(map(str, topology.grid))}"
    # libtpu assumes hosts of 2x2 chips; fewer must be said.
    bounds = {"chips_per_host_bounds": (*topology.grid, 1)[:3]} if topology.num_chips < 4 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except jax.errors.JaxRuntimeError as error:
        raise NoSuchTopology(f"{topology.name}: libtpu has no {name}: {error}") from error
    return list(np.array(found.devices).flat)


def set_tpu_environment() -> None:
    """Let libtpu load where there is no TPU, quietly, and beside other processes that do the same. Call it before jax looks
    for devices, in a process that compiles for TPUs and never runs on one."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v6e-4"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
