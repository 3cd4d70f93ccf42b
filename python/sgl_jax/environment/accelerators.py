"""TPUs and GPUs as the system shows them: PCI bus, device files, drivers. Touches no device, loads no runtime.

`root` is the root of the file system, so that tests can describe other machines.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from sgl_jax.environment.facts import Gpu, Gpus, Holder, Tpus
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
_LIBTPU_LOCK = "/tmp/libtpu_lockfile"  # held open by whoever has loaded libtpu, which refuses all others
_DISPLAY = "0x03"  # PCI class: an NVIDIA card has audio and USB functions, too
_QUERY = "name,memory.total,memory.used,compute_cap,driver_version"
_WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"
NVIDIA_SMI_TIMEOUT_S = 20.0  # it hangs when the driver does

Run = Callable[[Sequence[str], float], str]  # command, timeout in seconds -> its output; raises OSError


def tpus(root: Path = Path("/")) -> Tpus:
    on_pci = _pci_devices(root)
    chips = tuple(_TPUS[device] for vendor, device, _ in on_pci if vendor == _GOOGLE and device in _TPUS)
    nodes = _nodes(root, "dev", r"accel\d+")
    if chips or not on_pci:  # VFIO serves any device: where the bus can be seen, it must show TPUs as well
        nodes += _nodes(root, "dev/vfio", r"\d+")
    pages = re.search(r"\[(\w+)\]", read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return Tpus(
        chips=chips,
        nodes=nodes,
        forbidden=tuple(node for node in nodes if not os.access(root / node.lstrip("/"), os.R_OK | os.W_OK)),
        holders=holders((*nodes, _LIBTPU_LOCK), root) if nodes else (),
        huge_pages=pages[1] if pages else None,
    )


def gpus(root: Path = Path("/"), run: Run | None = None) -> Gpus:
    """`run` starts nvidia-smi; the default does so with a bound."""
    driver = re.search(
        r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s",  # also "NVIDIA UNIX Open Kernel Module for x86_64  580.82.07 …"
        read(root / "proc/driver/nvidia/version"),
    )
    found, smi_driver, smi = _ask_nvidia_smi(run or _run)
    return Gpus(
        nodes=_nodes(root, "dev", r"nvidia\d+|nvidiactl|dxg|kfd"),
        nvidia_on_pci=sum(v == _NVIDIA and kind.startswith(_DISPLAY) for v, _, kind in _pci_devices(root)),
        driver=smi_driver or (driver[1] if driver else None),
        nvidia_smi=smi,
        gpus=found,
        amd=(root / "dev/kfd").exists(),
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


def holders(nodes: Sequence[str], root: Path = Path("/")) -> tuple[Holder, ...]:
    """Processes that have one of these files open; those of other users show only to root."""
    found = {}
    for folder in root.glob("proc/[0-9]*/fd"):
        pid = int(folder.parent.name)
        for node in sorted(_opened_files(folder).intersection(nodes)):
            found.setdefault(pid, Holder(pid, read(folder.parent / "comm") or "unknown", node))
    return tuple(found[pid] for pid in sorted(found))


def _opened_files(folder: Path) -> set[str]:
    opened = set()
    with contextlib.suppress(OSError):  # another user's process, or one that has ended
        for link in folder.iterdir():
            with contextlib.suppress(OSError):
                opened.add(os.readlink(link))
    return opened


def _ask_nvidia_smi(run: Run) -> tuple[tuple[Gpu, ...], str | None, str]:
    """(GPUs, driver version, "ok" or why there is no answer)."""
    program = shutil.which("nvidia-smi") or (_WSL_NVIDIA_SMI if os.path.exists(_WSL_NVIDIA_SMI) else "nvidia-smi")
    try:
        output = run([program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], NVIDIA_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return (), None, "not found"
    except OSError as error:
        return (), None, str(error)
    rows = [[part.strip() for part in line.split(",")] for line in output.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    found = tuple(Gpu(name, _mib(total), _mib(used), capability) for name, total, used, capability, _ in rows)
    return found, rows[0][4] if rows else None, "ok" if rows else "lists no GPU"


def _mib(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None  # "[N/A]" where memory is shared


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(said[0] if said else f"exit code {done.returncode}")
    return done.stdout
