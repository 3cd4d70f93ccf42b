"""Target of a plan: a topology of accelerators, or the devices of this machine."""

import dataclasses
from collections.abc import Callable

import jax

from sgl_jax.planning.cost import Rates
from sgl_jax.planning.machine_rates import NotMeasured, measure_rates
from sgl_jax.planning.topology import NoSuchTopology, Topology, parse, tpu_devices
from sgl_jax.runtime.memory import device_memory
from sgl_jax.runtime.platform import PLATFORMS, Name, Platform, pick_devices


@dataclasses.dataclass(frozen=True)
class Target:
    name: str  # v6e-4
    kind: str
    platform: Platform
    num_devices: int
    device_bytes: int
    topology: Topology | None  # None: devices of this machine
    find_devices: Callable[[], list[jax.Device]]  # devices to compile for; may raise NoSuchTopology

    @property
    def is_here(self) -> bool:
        return self.topology is None

    def rates(self, dtype: str) -> Rates | None:
        """Return the rates of a device: the maker's figures for a topology; for this machine they are measured now, which
        takes about 2 s. None: they cannot be measured."""
        if self.topology is None:
            try:
                return measure_rates(self.find_devices(), dtype)
            except NotMeasured:
                return None
        chip, summed = self.topology.chip, self.topology.all_reduce_bytes_per_s(self.num_devices)
        return Rates(chip.flops[dtype], chip.bytes_per_s, summed, self.topology.all_reduce_latency_s(self.num_devices))


def find_target(name: str, tp_size: int | None = None, dp_size: int = 1) -> Target:
    """Return the tp_size x dp_size devices that `name` means: a topology, or "cpu" or "gpu" for the devices of this machine.

    Without `tp_size`, all devices of a topology, and dp_size devices of this machine. Raises NoSuchTopology or NoDevice.
    """
    if name in ("cpu", "gpu"):
        return target_here(name, (tp_size or 1) * dp_size)
    topology = parse(name)
    number = topology.num_devices if tp_size is None else tp_size * dp_size
    if number > topology.num_devices or number % dp_size:
        asked = f"--dp-size is {dp_size}" if tp_size is None else f"--tp-size is {tp_size} and --dp-size {dp_size}"
        raise NoSuchTopology(f"{asked}; {name} has {topology.num_devices} devices")
    chip, find = topology.chip, lambda: tpu_devices(topology)[:number]
    return Target(name, chip.kind, PLATFORMS[chip.platform], number, chip.memory_bytes, topology, find)


def target_here(wanted: Name | None, number: int) -> Target:
    """Return devices of this machine, as the server picks them. Raises NoDevice."""
    platform, devices = pick_devices(wanted, number)
    sharers = len(devices) if platform.name == "cpu" else 1  # virtual CPU devices live in one memory
    memory = device_memory(devices[0]) // sharers
    return Target(platform.name, devices[0].device_kind, platform, number, memory, None, lambda: devices)
