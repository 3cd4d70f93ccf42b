"""The committed report of what was compiled for which TPUs: benchmarks/tpu_programs.json, and a table of it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
REPORT = REPOSITORY / "benchmarks" / "tpu_programs.json"
MODELS = ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B", "Gemma-2-9B", "Qwen3-30B-A3B")
TOPOLOGIES = ("v6e-1", "v6e-4", "v6e-8", "v7x-1", "v7x-4")

Launches = dict[str, dict[str, Any]]  # by model and topology


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def read() -> Launches:
    return json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}


def add(model: str, topology: str, entry: dict[str, Any]) -> None:
    """Into the report, in the place of what it had of this launch, and the table anew."""
    launches = read() | {f"{model} {topology}": entry}
    order = [f"{model} {topology}" for model in MODELS for topology in TOPOLOGIES]
    launches = {name: launches[name] for name in order if name in launches}
    REPORT.write_text(json.dumps(launches, indent=1) + "\n", encoding="utf-8")
    REPORT.with_suffix(".md").write_text(table(launches), encoding="utf-8")


def table(launches: Launches) -> str:
    lines = [
        "# Programs compiled for TPUs that were not there",
        "",
        "Made by `make test-tpu-full`: every program of a default launch (`--attention-backend fa`, all chips of the",
        "topology), compiled by libtpu and read. What is asked of each: [tpu.md](../docs/features/tpu.md). No fault means",
        "that all of it holds for every step program of the launch. All figures are in `tpu_programs.json`.",
        "",
        "| model | topology | programs | faults | CPU s | code MB | largest temporaries MB (% of the pool) | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    faults = []
    for model in MODELS:
        for topology in TOPOLOGIES:
            entry = launches.get(f"{model} {topology}")
            lines.append(f"| {model} | {topology} | {_cells(entry)} |")
            faults += [f"- {model} {topology}, {fault}" for fault in (entry or {}).get("faults", [])]
    dates = sorted({json.dumps(entry["versions"]) for entry in launches.values()})
    lines += ["", "Versions: " + "; ".join(" ".join(f"{k} {v}" for k, v in json.loads(each).items()) for each in dates)]
    if faults:
        lines += ["", "## Faults", "", *faults]
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not yet compiled | | | | |"
    if "misfit" in entry:
        return f"does not fit | | | | | {entry['date']}"
    programs = entry["programs"]
    temp = max(program["temp_bytes"] for program in programs)
    code = sum(program["code_bytes"] for program in programs)
    cells = (
        len(programs),
        len(entry["faults"]) or "none",
        f"{entry['cpu_seconds']:.0f}",
        f"{code / 1e6:.0f}",
        f"{temp / 1e6:.0f} ({100 * temp / entry['kv_bytes']:.2f})",
        entry["date"],
    )
    return " | ".join(map(str, cells))
