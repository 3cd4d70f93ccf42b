"""TPUs and GPUs as the system shows them: PCI bus, device files, drivers. Touches no device, loads no runtime.

`root` is the root of the file system, so that tests can describe other machines.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from sgl_jax.environment.facts import Gpus, Tpus
from sgl_jax.environment.machine import read

_GOOGLE, _NVIDIA = "0x1ae0", "0x10de"
# As in jax's own table. Google has other devices on the PCI bus, network and disk among them.
_TPUS = {
    "0x0027": "TPU v2 or v3",
    "0x0056": "TPU",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU 7x",
    "0x0083": "TPU 8i",
    "0x007c": "TPU 8t",
}
_DISPLAY = "0x03"  # PCI class: an NVIDIA card has audio and USB functions, too
NVIDIA_SMI_TIMEOUT_S = 20.0  # it hangs when the driver does

Run = Callable[[Sequence[str], float], str]  # command, timeout in seconds -> its output; raises OSError


def tpus(root: Path = Path("/")) -> Tpus:
    on_pci = _pci_devices(root)
    chips = tuple(_TPUS[device] for vendor, device, _ in on_pci if vendor == _GOOGLE and device in _TPUS)
    nodes = _nodes(root, "dev", r"accel\d+")
    if chips or not on_pci:  # VFIO serves any device: where the bus can be seen, it must show TPUs as well
        nodes += _nodes(root, "dev/vfio", r"\d+")
    return Tpus(chips, nodes)


def gpus(root: Path = Path("/"), run: Run | None = None) -> Gpus:
    """`run` starts nvidia-smi; the default does so with a bound."""
    names, driver, smi = _ask_nvidia_smi(run or _run)
    return Gpus(
        nodes=_nodes(root, "dev", r"nvidia\d+|nvidiactl|dxg|kfd"),
        on_pci=sum(v == _NVIDIA and kind.startswith(_DISPLAY) for v, _, kind in _pci_devices(root)),
        driver=driver,
        nvidia_smi=smi,
        names=names,
    )


def _pci_devices(root: Path) -> list[tuple[str, str, str]]:
    """(vendor, device, class), each like 0x1ae0, of what is on the PCI bus; function 0 only, the one that counts."""
    folders = sorted(root.glob("sys/bus/pci/devices/*.0"))
    return [(read(each / "vendor"), read(each / "device"), read(each / "class")) for each in folders]


def _nodes(root: Path, folder: str, pattern: str) -> tuple[str, ...]:
    try:
        names = sorted(os.listdir(root / folder))
    except OSError:
        return ()
    return tuple(f"/{folder}/{name}" for name in names if re.fullmatch(pattern, name))


def _ask_nvidia_smi(run: Run) -> tuple[tuple[str, ...], str | None, str]:
    """(GPUs, driver version, "ok" or why there is no answer)."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        output = run(query, NVIDIA_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return (), None, "not found"
    except OSError as error:
        return (), None, str(error)
    rows = [parts for line in output.splitlines() if len(parts := [part.strip() for part in line.split(",")]) == 3]
    found = tuple(f"{name} ({memory})" for _, name, memory in rows)
    return found, rows[0][0] if rows else None, "ok" if rows else "lists no GPU"


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(said[0] if said else f"exit code {done.returncode}")
    return done.stdout
