"""Where no TPU can be, libtpu is left alone; where one may be, jax looks for it as ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgl_jax.runtime import platform
from sgl_jax.runtime.platform import may_have_tpu


@pytest.fixture
def machine(tmp_path: Path):
    """Return a function that makes up a machine of device files and PCI devices (vendor, class)."""

    def make(*nodes: str, pci: tuple[tuple[str, str], ...] = ()) -> Path:
        for node in nodes:
            tmp_path.joinpath(node).parent.mkdir(parents=True, exist_ok=True)
            tmp_path.joinpath(node).touch()
        for i, (vendor, kind) in enumerate(pci):
            folder = tmp_path / f"sys/bus/pci/devices/0000:00:0{i}.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(vendor + "\n")
            (folder / "class").write_text(kind + "\n")
        return tmp_path

    return make


def test_a_tpu_may_be_where_its_device_file_or_an_unknown_device_of_google_is(machine) -> None:
    assert may_have_tpu(machine("dev/accel0"))


def test_vfio_nodes_and_accelerators_on_the_bus_count(machine) -> None:
    assert may_have_tpu(machine("dev/vfio/7"))
    assert may_have_tpu(machine(pci=(("0x1ae0", "0x120000"),)))


def test_a_cloud_machine_without_tpu_has_none(machine) -> None:
    disk, network, gpu = ("0x1ae0", "0x010802"), ("0x1ae0", "0x020000"), ("0x10de", "0x030200")
    assert not may_have_tpu(machine("dev/vfio/vfio", "dev/accelerometer", pci=(disk, network, gpu)))


@pytest.mark.parametrize(
    ("wanted", "chosen", "has_tpu", "plugins", "set_to"),
    [
        (None, None, False, [], ["cpu"]),
        (None, "", False, [], ["cpu"]),
        (None, None, True, [], []),
        (None, None, False, ["cuda"], []),
        (None, "tpu", False, [], []),
        ("tpu", None, False, [], []),
        ("cpu", "tpu", True, ["cuda"], ["cpu"]),
    ],
)
def test_jax_is_kept_to_the_cpu_only_where_nothing_else_is_asked_for_or_can_be(
    monkeypatch: pytest.MonkeyPatch, wanted, chosen, has_tpu, plugins, set_to
) -> None:
    found: list[str] = []
    config = SimpleNamespace(jax_platforms=chosen, update=lambda name, value: found.append(value))
    device = SimpleNamespace(process_index=0)
    monkeypatch.setattr(platform, "jax", SimpleNamespace(config=config, devices=lambda name: [device]))
    monkeypatch.setattr(platform, "may_have_tpu", lambda: has_tpu)
    monkeypatch.setattr(platform.metadata, "entry_points", lambda group: plugins)
    platform.pick_devices(wanted)
    assert found == set_to


def test_libtpu_prints_nothing_where_no_tpu_can_be() -> None:
    """libtpu is installed beside the tests."""
    code = "from sgl_jax.runtime import platform; platform.may_have_tpu = lambda: False; platform.pick_devices(None)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stderr == ""
