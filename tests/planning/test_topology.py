"""Names of topologies, and the devices to compile for."""

from __future__ import annotations

import importlib.util
import math

import pytest
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.planning.topology import CHIPS, NoSuchTopology, parse, tpu_devices

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("name", "chips", "devices", "links"),
    [
        *[("v5e-1", 1, 1, 0), ("v6e-4", 4, 4, 2), ("v6e-8", 8, 8, 2), ("v6e-256", 256, 256, 4), ("v5p-4", 4, 4, 2)],
        *[("v7x-1", 1, 2, 0), ("v7x-4", 4, 8, 2), ("v7x-64", 64, 128, 6), ("h200-8", 8, 8, 1)],
    ],
)
def test_a_name_is_a_kind_and_a_number_of_chips(name: str, chips: int, devices: int, links: int) -> None:
    topology = parse(name)
    assert (topology.num_chips, topology.num_devices, topology.links) == (chips, devices, links)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v6e", "^v6e .*cpu, gpu.* v5e-N, v5p-N, v6e-N, v7x-N"),
        ("v9-4", "^v9-4 .*cpu, gpu.* v5e-N"),
        ("v6e-3", "^v6e-3.* 1, 2, 4, 8, 16, 32, 64, 128, 256"),
    ],
)
def test_other_names_are_refused_with_those_there_are(name: str, says: str) -> None:
    with pytest.raises(NoSuchTopology, match=says):
        parse(name)


def test_a_gpu_that_is_not_here_cannot_be_compiled_for() -> None:
    with pytest.raises(NoSuchTopology, match=r"h200-8.*--plan"):
        tpu_devices(parse("h200-8"))


def test_summing_over_chips_takes_each_twice_its_share_over_its_links() -> None:
    # Four chips in a square have two neighbours each: 2 * 3/4 of the bytes over 2 links of 100 GB/s.
    assert parse("v6e-4").all_reduce_bytes_per_s(4) == pytest.approx(200e9 / 1.5)
    assert parse("v6e-4").all_reduce_bytes_per_s(2) == pytest.approx(200e9 / 1.0)
    assert parse("v6e-1").all_reduce_bytes_per_s(1) == math.inf
    assert parse("v7x-1").all_reduce_bytes_per_s(2) == math.inf  # both devices are one chip
    assert parse("v7x-4").all_reduce_bytes_per_s(8) == pytest.approx(200e9 / 1.5)


@pytest.mark.parametrize(("kind", "version"), [("v5e", "v5e"), ("v6e", "v6e"), ("v7x", "7x")])
def test_the_figures_are_those_jax_knows(kind: str, version: str) -> None:
    chip, known = CHIPS[kind], pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
    assert chip.bytes_per_s == pytest.approx(known.mem_bw_bytes_per_second, rel=0.01)
    assert chip.flops["bfloat16"] == pytest.approx(known.bf16_ops_per_second, rel=0.01)
    assert 0.95 < chip.memory_bytes / known.hbm_capacity_bytes < 1


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-1", "v5p-2", "v6e-1", "v6e-2", "v6e-4", "v6e-16", "v7x-1", "v7x-4", "v7x-8"])
def test_libtpu_has_the_devices(name: str) -> None:
    topology = parse(name)
    devices = tpu_devices(topology)
    assert len(devices) == topology.num_devices
    assert {device.platform for device in devices} == {"tpu"}
