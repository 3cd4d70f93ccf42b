"""Engines on grids of virtual devices take other weights and lend their memory (grid_updates.py): sharded, with heads that
several devices hold, stacked, quantised, and with a draft model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from quick_compiles import XLA_FLAG

SCRIPT = Path(__file__).with_name("grid_updates.py")
CASES = {
    "llama": ["1-self", "tp2-scan-int8", "dp2-tp2"],
    "qwen3_moe": ["tp4-ep2"],
    "deepseek_v2": ["1-scan"],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_exchanged_on_any_grid(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint(name)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {
        key: -tensor if "down_proj" in key else tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    command = [sys.executable, str(SCRIPT), str(folder), str(tmp_path), *CASES[name]]
    environment = os.environ | {"XLA_FLAGS": f"{XLA_FLAG} --xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{grid: 0} for grid in CASES[name]]
