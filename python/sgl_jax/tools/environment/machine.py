"""Facts that the operating system shows: host, TPUs and GPUs. Touches no device, loads no runtime.

Reads files; a missing one leaves None. `root` is the root of the file system, so that tests can describe other machines.
"""

import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from sgl_jax.runtime.control_groups import ROOT, cpu_limit, memory_limit, read
from sgl_jax.tools.environment.facts import Machine, Signs

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"  # PCI vendors
# As in jax's own table. Google has other devices on the PCI bus, network and disk among them.
_TPUS = {"0x0027": "TPU v2 or v3", "0x0056": "TPU", "0x005e": "TPU v4", "0x0062": "TPU v5p", "0x0063": "TPU v5e"}
_TPUS |= {"0x006f": "TPU v6e", "0x0076": "TPU 7x", "0x0083": "TPU 8i", "0x007c": "TPU 8t"}
_DISPLAY = "0x03"  # PCI class: an NVIDIA card has audio and USB functions, too


def look(environ: Mapping[str, str], root: Path = ROOT) -> Machine:
    """Describe the host, as far as it can be found out."""
    model = _found(r"^(?:model name|Model)\s*:\s*(.+)$", root / "proc/cpuinfo")
    memory = _found(r"^MemTotal:\s+(\d+) kB$", root / "proc/meminfo")
    distribution = _found(r'^PRETTY_NAME="?([^"\n]+)', root / "etc/os-release")
    marks = [root / ".dockerenv", root / "run/.containerenv"]  # Docker's and Podman's
    return Machine(
        hostname=socket.gethostname() or "unknown",
        system=", ".join((*distribution, f"{platform.system()} {platform.release()}")),
        python=f"{platform.python_version()} ({platform.machine()}), {sys.executable or 'unknown'}",
        cpu_model=next(iter(model), platform.processor() or platform.machine() or "unknown"),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory=int(memory[0]) << 10 if memory else None,
        in_container="KUBERNETES_SERVICE_HOST" in environ or any(mark.exists() for mark in marks),
        cgroup_cpus=cpu_limit(root),
        cgroup_memory=memory_limit(root),
    )


def _found(pattern: str, path: Path) -> list[str]:
    return re.findall(pattern, read(path), re.MULTILINE)


def tpus(root: Path = ROOT) -> Signs:
    """Return the TPU chips on the PCI bus and their device files."""
    on_pci = _pci_devices(root)
    chips = tuple(_TPUS[device] for vendor, device, _ in on_pci if vendor == _GOOGLE and device in _TPUS)
    nodes = _nodes(root, "dev", r"accel\d+")
    if chips or not on_pci:  # VFIO serves any device: where the bus can be seen, it must show TPUs as well
        nodes += _nodes(root, "dev/vfio", r"\d+")
    return Signs(chips, nodes)


def gpus(root: Path = ROOT) -> Signs:
    """Return NVIDIA's GPUs as the driver names them, or the PCI bus, with their device files."""
    folder = root / "proc/driver/nvidia"
    names = [name for path in folder.glob("gpus/*/information") for name in _found(r"^Model:\s*(.+)$", path)]
    cards = [kind for vendor, _, kind in _pci_devices(root) if vendor == _NVIDIA and kind.startswith(_DISPLAY)]
    driver = _found(r"Kernel Module.*?  (\d+[\d.]+)  ", folder / "version")
    nodes = _nodes(root, "dev", r"nvidia\d+|nvidiactl|dxg")
    return Signs(tuple(names or ["NVIDIA GPU"] * len(cards)), nodes, next(iter(driver), ""))


def _pci_devices(root: Path) -> list[tuple[str, str, str]]:
    """Return (vendor, device, class), each like 0x1ae0, of function 0 of all that is on the PCI bus."""
    folders = sorted(root.glob("sys/bus/pci/devices/*.0"))
    return [(read(each / "vendor"), read(each / "device"), read(each / "class")) for each in folders]


def _nodes(root: Path, folder: str, pattern: str) -> tuple[str, ...]:
    names = sorted(path.name for path in (root / folder).glob("*"))
    return tuple(f"/{folder}/{name}" for name in names if re.fullmatch(pattern, name))
