"""Runs grid_engine.py, or a script like it, and compares its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from quick_compiles import XLA_FLAG

SCRIPT = Path(__file__).with_name("grid_engine.py")


def run_grids(folder: Path, grids: list[str], script: Path = SCRIPT) -> list[dict[str, Any]]:
    command = [sys.executable, str(script), str(folder), *grids]
    environment = os.environ | {"XLA_FLAGS": f"{XLA_FLAG} --xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(one: dict[str, Any], many: dict[str, Any], atol: float = 1e-4) -> None:
    """Tokens are equal, whatever was sampled; logprobs as near as sums in another order are."""
    for a, b in zip(one["answers"], many["answers"], strict=True):
        assert b["output_ids"] == a["output_ids"]
        a, b = a["meta_info"], b["meta_info"]
        assert [top[0][1] for top in a["output_top_logprobs"]] == [top[0][1] for top in b["output_top_logprobs"]]
        for key in ("input_token_logprobs", "output_token_logprobs"):
            first = 1 if key == "input_token_logprobs" else 0  # nothing comes before the first prompt token
            np.testing.assert_allclose(
                [x[0] for x in a[key][first:]], [x[0] for x in b[key][first:]], atol=atol, err_msg=key
            )
    assert many["more"] == one["more"]
    assert many["cached_tokens"] > 0
    assert many["compiles_after_ready"] == 0
