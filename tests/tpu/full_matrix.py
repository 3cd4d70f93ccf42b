"""Every program of default launches, for each model and topology: `make test-tpu-full`, which also writes the report
benchmarks/tpu_programs.json. Takes hours on two cores; `make test` has a choice of it (test_step_programs.py)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest
import tpu_programs

from sgl_jax.planning.plan import Misfit
from sgl_jax.planning.programs import read_facts
from sgl_jax.planning.report import as_data
from sgl_jax.runtime.compiler import Compiled, CompileWatch, compile_all, matmul_precision

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_programs.json"
MODELS = ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B")
TOPOLOGIES = ("v6e-1", "v6e-4", "v6e-8", "v7x-1", "v7x-4")
ATTENTION = "fa"


@pytest.fixture(scope="module")
def report() -> Iterator[list[dict[str, Any]]]:
    launches: list[dict[str, Any]] = []
    yield launches
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    today = datetime.date.today().isoformat()
    REPORT.write_text(json.dumps({"date": today, "versions": versions, "launches": launches}, indent=1) + "\n")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
def test_launch(model: str, topology: str, report: list[dict[str, Any]]) -> None:
    try:
        plan, programs, placement = tpu_programs.planned(model, topology, ATTENTION)
    except Misfit as misfit:
        pytest.skip(str(misfit).splitlines()[0])
    facts, broken = [], []

    def read(done: int, total: int, compiled: Compiled) -> None:
        facts.append(read_facts(compiled, plan.model.config.num_layers))
        for step in plan.steps:
            if compiled.program.name == f"tokens={step.bucket.num_tokens} rows={step.bucket.num_rows}":
                bucket = step.bucket
                broken.extend(
                    f"{compiled.program.name}: {what}"
                    for what in tpu_programs.faults(
                        tpu_programs.read(plan, bucket.num_tokens, bucket.num_rows, compiled.program, compiled.call)
                    )
                )

    with jax.default_matmul_precision(matmul_precision(plan.launch.dtype)):
        compile_all(programs.values(), CompileWatch(), read, absent=placement.mesh)
    seconds = sum(each.seconds for each in facts)
    report.append(as_data(plan, facts, seconds) | {"attention": ATTENTION, "faults": sorted(broken)})
    assert broken == []
