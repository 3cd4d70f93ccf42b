"""Measure compile time and program size of 4 and 48 layers of each family, with scanned layers.

    PYTHONPATH=tests:tests/e2e python benchmarks/depth.py --output benchmarks/depth.json

Times are processor times, the least of several tries, so that other programs on the machine matter less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax
from layer_depth import DEPTHS, at_depth, step_program
from provenance import commit, machine
from test_families_size import CONFIGS, FOLDERS

ORACLE = Path(__file__).resolve().parents[1] / "tests" / "data" / "oracle"


def measure(config: dict, layers: int, tries: int) -> dict[str, float]:
    program = step_program(at_depth(config, layers))
    seconds = []
    for _ in range(tries):
        jax.clear_caches()
        started = time.process_time()
        compiled = program.function.lower(*program.args).compile()
        seconds.append(time.process_time() - started)
    text = compiled.as_text()
    return {"cpu_seconds": round(min(seconds), 2), "instructions": text.count(" = "), "hlo_bytes": len(text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=2)
    args = parser.parse_args()
    found = {}
    for architecture in [*FOLDERS, *CONFIGS]:
        folder = FOLDERS.get(architecture)
        config = json.loads((ORACLE / folder / "config.json").read_text()) if folder else CONFIGS[architecture]
        shallow, deep = (measure(config, layers, args.tries) for layers in DEPTHS)
        ratios = {key: round(deep[key] / shallow[key], 3) for key in shallow}
        found[architecture] = {f"{DEPTHS[0]} layers": shallow, f"{DEPTHS[1]} layers": deep, "ratio": ratios}
        print(architecture, ratios, flush=True)
    about = {"commit": commit(), "machine": machine(), "command": " ".join(sys.argv), "cores": os.cpu_count()}
    args.output.write_text(json.dumps(about | {"families": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
