"""The attention kernels as libtpu compiles them: in place, within VMEM, and in as few bundles as were committed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "tpu_kernels.py"
COMMITTED = json.loads(SCRIPT.with_suffix(".json").read_text())
MEASURED = [name for name in COMMITTED["cases"] if "TP4 page 128" in name or name == "decode v7x TP1 page 128"]
TOLERANCE = 1.03
VMEM = {"v6e": 128 << 20, "v7x": 64 << 20}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Measure in a process of its own, as libtpu reads its flags once."""
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    only = "|".join(f"^{name}$" for name in MEASURED)
    command = [sys.executable, str(SCRIPT), "--only", only, "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    if record["libtpu"] != COMMITTED["libtpu"]:
        pytest.skip(f"bundles were committed for libtpu {COMMITTED['libtpu']}, this is {record['libtpu']}")
    return record["cases"]


@pytest.mark.parametrize("name", MEASURED)
def test_bundles_stay_within_what_was_committed(measured, name):
    budget = COMMITTED["cases"][name]["bundles"]
    assert {k: n for k, n in measured[name]["bundles"].items() if n > budget[k] * TOLERANCE} == {}


@pytest.mark.parametrize("name", MEASURED)
def test_the_pool_changes_in_place_and_vmem_is_left_for_others(measured, name):
    case = measured[name]
    assert case["aliased_bytes"] == case["pool_bytes"]
    assert case["temp_bytes"] < 0.05 * case["pool_bytes"]  # activations, and nothing of the size of the pool
    assert case["vmem_bytes"] < VMEM[case["chip"]] // 2
    assert case["cost_flops"] > 0  # the compiler's scheduler is told what the call costs


@pytest.fixture(scope="module")
def kernels():
    """Load the scoreboard's script as a module."""
    spec = importlib.util.spec_from_file_location("tpu_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["tpu_kernels"] = kernels
    spec.loader.exec_module(kernels)
    return kernels


def least_cycles(kernels, shape: str, width: int) -> tuple[int, float, int, int]:
    """Return the committed figures of a row of 1024 keys on v6e: bundles, cycles of its copies, bytes moved, least bytes."""
    case = COMMITTED["cases"][f"decode v6e {shape} page 128" + f" W={width}" * (width > 1)]
    bundles = kernels.decode_bundles(case["bundles"], 1024, case["block"], case["unit"], 128, width)
    moved, least = kernels.decode_bytes(1024, 128, kernels.SHAPES[shape], width=width)
    return bundles, moved * 1.75e9 / 1640e9, moved, least


def test_decode_is_bound_by_copies_at_1024_keys_on_v6e(kernels):
    """The committed bundles take fewer cycles than bytes over bandwidth."""
    for shape in ("TP1", "TP4", "TP8"):
        bundles, cycles, moved, least = least_cycles(kernels, shape, 1)
        assert bundles < cycles
        assert moved < 1.02 * least


def test_four_queries_of_a_row_read_its_keys_once(kernels):
    """A block has the same copies as with one query, and the row is still bound by them; products grow with latent heads."""
    for shape in kernels.SHAPES:
        for chip in kernels.CLOCK:
            one, four = (COMMITTED["cases"][f"decode {chip} {shape} page 128{w}"] for w in ("", " W=4"))
            assert one["block"] == four["block"]
            assert one["bundles"]["copies_in_block"] == four["bundles"]["copies_in_block"] > 0
            if not kernels.SHAPES[shape].is_latent:
                assert four["bundles"]["key_block"] < 1.15 * one["bundles"]["key_block"]
    for shape in ("TP1", "TP4"):
        bundles, cycles, moved, _ = least_cycles(kernels, shape, 4)
        assert bundles < cycles
        assert moved < 1.03 * least_cycles(kernels, shape, 1)[2]
