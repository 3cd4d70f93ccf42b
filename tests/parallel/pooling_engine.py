"""`python pooling_engine.py FOLDER GRID…`: vectors that an engine on each grid of devices makes of the prompts in FOLDER's
oracle.json, as JSON lines. Run with 8 virtual CPU devices. GRID is as in grid_engine.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from grid_engine import flags

import sgl_jax
from sgl_jax.runtime import platform


def answers(folder: Path, grid: str) -> dict[str, Any]:
    """Answer all prompts at once, and again, when they are cached."""
    cases = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))["cases"]
    prompts = [case["ids"] for case in cases]
    with sgl_jax.Engine(
        model_path=str(folder),
        dtype="float32",
        page_size=4,
        max_running_requests=8,
        chunked_prefill_size=32,
        max_total_tokens=1024,
        task="score" if "logit_no" in cases[0] else None,
        **flags(grid),
    ) as engine:
        first, second = engine.encode(input_ids=prompts), engine.encode(input_ids=prompts)
        stats = engine.stats
    assert stats.compiles_after_ready == 0
    return {"first": first, "second": second, "cached_tokens": stats.cached_tokens}


if __name__ == "__main__":
    for grid in sys.argv[2:]:
        scan = "scan" in grid.split("-")
        cpu = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=scan, vectorises_rows=scan)
        platform.PLATFORMS["cpu"] = cpu
        print(json.dumps(answers(Path(sys.argv[1]), grid)), flush=True)
