"""TPUs and GPUs as the system shows them, in a file system made for the test."""

from __future__ import annotations

from pathlib import Path

from sgl_jax.tools.environment.facts import Signs
from sgl_jax.tools.environment.machine import gpus, tpus


def on_pci(root: Path, *devices: tuple[str, str, str]) -> Path:
    for number, (vendor, device, kind) in enumerate(devices):
        folder = root / f"sys/bus/pci/devices/0000:00:{number:02x}.0"
        folder.mkdir(parents=True)
        for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (folder / name).write_text(f"{value}\n")
    return root


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")
    return root


DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 12\n"
)
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (builder)\nGCC version:\n"
)


def with_driver(root: Path, version: str, *models: str) -> Path:
    for number, model in enumerate(models):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 49\n")
    (root / "proc/driver/nvidia/version").write_text(version)
    return root


def test_an_empty_machine_shows_nothing(tmp_path: Path) -> None:
    assert tpus(tmp_path) == Signs()
    assert gpus(tmp_path) == Signs()
    assert not tpus(tmp_path).visible


def test_tpu_chips_are_told_from_other_devices_of_google(tmp_path: Path) -> None:
    root = on_pci(
        tmp_path,
        ("0x1ae0", "0x0063", "0x120000"),
        ("0x1ae0", "0x0063", "0x120000"),
        ("0x1ae0", "0x0042", "0x020000"),  # network
        ("0x8086", "0x0063", "0x060000"),
    )
    make(root, "dev/vfio/vfio", "dev/vfio/0", "dev/vfio/1")
    assert tpus(root) == Signs(("TPU v5e", "TPU v5e"), ("/dev/vfio/0", "/dev/vfio/1"))


def test_vfio_groups_of_other_devices_are_no_tpus(tmp_path: Path) -> None:
    root = make(on_pci(tmp_path, ("0x10de", "0x2335", "0x030200")), "dev/vfio/12")
    assert tpus(root) == Signs()


def test_where_the_bus_cannot_be_seen_device_files_count(tmp_path: Path) -> None:
    root = make(tmp_path, "dev/vfio/0", "dev/accel1", "dev/accel0", "dev/accelerometer")
    assert tpus(root).nodes == ("/dev/accel0", "/dev/accel1", "/dev/vfio/0")
    assert tpus(root).visible


def test_the_driver_names_its_gpus(tmp_path: Path) -> None:
    root = make(tmp_path, "dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm")
    nodes = ("/dev/nvidia0", "/dev/nvidiactl")
    assert gpus(root) == Signs((), nodes)
    assert gpus(with_driver(root, DRIVER, "NVIDIA H200", "NVIDIA H200")) == Signs(
        ("NVIDIA H200", "NVIDIA H200"), nodes, "535.129.03"
    )
    assert gpus(with_driver(root, OPEN_DRIVER)).driver == "580.82.07"


def test_cards_count_once_whatever_functions_they_have(tmp_path: Path) -> None:
    root = on_pci(tmp_path, ("0x10de", "0x2684", "0x030000"), ("0x10de", "0x22ba", "0x040300"))
    assert gpus(root) == Signs(("NVIDIA GPU",))
