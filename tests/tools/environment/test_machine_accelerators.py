"""TPUs and GPUs as the system shows them, in a file system made for the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sgl_jax.tools.environment.facts import Gpus, Tpus
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


def answering(text: str = "", error: OSError | None = None):
    def run(command: Sequence[str], timeout_s: float) -> str:
        if error:
            raise error
        return text

    return run


NO_SMI = answering(error=FileNotFoundError())


def test_an_empty_machine_shows_nothing(tmp_path: Path) -> None:
    assert tpus(tmp_path) == Tpus()
    assert gpus(tmp_path, NO_SMI) == Gpus()
    assert not tpus(tmp_path).visible
    assert not gpus(tmp_path, NO_SMI).nvidia


def test_tpu_chips_are_told_from_other_devices_of_google(tmp_path: Path) -> None:
    root = on_pci(
        tmp_path,
        ("0x1ae0", "0x0063", "0x120000"),
        ("0x1ae0", "0x0063", "0x120000"),
        ("0x1ae0", "0x0042", "0x020000"),  # network
        ("0x8086", "0x0063", "0x060000"),
    )
    make(root, "dev/vfio/vfio", "dev/vfio/0", "dev/vfio/1")
    assert tpus(root) == Tpus(("TPU v5e", "TPU v5e"), ("/dev/vfio/0", "/dev/vfio/1"))


def test_vfio_groups_of_other_devices_are_no_tpus(tmp_path: Path) -> None:
    root = make(on_pci(tmp_path, ("0x10de", "0x2335", "0x030200")), "dev/vfio/12")
    assert tpus(root) == Tpus()


def test_where_the_bus_cannot_be_seen_device_files_count(tmp_path: Path) -> None:
    root = make(tmp_path, "dev/vfio/0", "dev/accel1", "dev/accel0", "dev/accelerometer")
    assert tpus(root).nodes == ("/dev/accel0", "/dev/accel1", "/dev/vfio/0")
    assert tpus(root).visible


def test_nvidia_smi_is_read(tmp_path: Path) -> None:
    line = "580.82.07, NVIDIA H200, 143771 MiB\n"
    found = gpus(make(tmp_path, "dev/nvidia0", "dev/nvidiactl", "dev/nvidia-uvm"), answering(line * 2))
    gpu = "NVIDIA H200 (143771 MiB)"
    assert found == Gpus(("/dev/nvidia0", "/dev/nvidiactl"), 0, "580.82.07", "ok", (gpu, gpu))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (answering(error=TimeoutError("no answer in 20 s")), "no answer in 20 s"),
        (answering(error=OSError("NVIDIA-SMI has failed")), "NVIDIA-SMI has failed"),
        (answering("No devices were found\n"), "lists no GPU"),
    ],
)
def test_what_nvidia_smi_does_instead_is_kept(tmp_path: Path, run, said: str) -> None:
    assert gpus(tmp_path, run).nvidia_smi == said


def test_cards_count_once_whatever_functions_they_have(tmp_path: Path) -> None:
    root = on_pci(tmp_path, ("0x10de", "0x2684", "0x030000"), ("0x10de", "0x22ba", "0x040300"))
    make(root, "dev/kfd")
    found = gpus(root, NO_SMI)
    assert (found.on_pci, found.nodes, found.nvidia) == (1, ("/dev/kfd",), True)


def test_a_real_nvidia_smi_that_fails_or_hangs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not reach the driver.'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus(tmp_path).nvidia_smi == "NVIDIA-SMI has failed because it could not reach the driver."
    program.write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr("sgl_jax.tools.environment.machine.NVIDIA_SMI_TIMEOUT_S", 0.2)
    assert gpus(tmp_path).nvidia_smi == "no answer in 0.2 s"
