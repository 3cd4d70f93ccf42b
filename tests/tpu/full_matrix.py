"""Every program of default launches, for each model and topology: `make test-tpu-full`.

Takes an hour on two cores. Each launch goes into benchmarks/tpu_programs.json when it is compiled, with its date and a digest
of its programs before compilation. A launch whose digest is unchanged is not compiled again, so the run can be stopped and
started again, and `make test-tpu-full ONLY="Gemma-2-9B and v6e-4"` does a part. `make test` compiles some of these programs
(test_step_programs.py).
"""

from __future__ import annotations

import datetime
import re
import time
from typing import Any

import jax
import matrix_report
import pytest
import tpu_programs

from sgl_jax.planning.fit import Misfit
from sgl_jax.planning.launch_programs import read_facts
from sgl_jax.planning.plan_report import as_data
from sgl_jax.runtime.compiler import Compiled, CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.programs import step_name

ATTENTION = "fa"
# Faults that are known (benchmarks/LOG.md), as their sentences begin. Any other fails, and so does one that is gone.
KNOWN = {
    ("Qwen3-32B", "v6e-4"): r"tokens=\d+ rows=256: \d+ MB of temporaries",  # long steps in parts, 2.2 % of a small pool
    ("Gemma-2-9B", "v6e-1"): r"tokens=\d+ rows=\d+: \d+ MB of temporaries",  # logits of 262 MB, 2.4 % of a small pool
}


def check(model: str, topology: str, faults: list[str]) -> None:
    known = KNOWN.get((model, topology))
    assert [fault for fault in faults if known is None or not re.match(known, fault)] == []
    assert known is None or faults, "a known fault is gone: take it out of KNOWN"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("topology", matrix_report.TOPOLOGIES)
@pytest.mark.parametrize("model", matrix_report.MODELS)
def test_launch(model: str, topology: str) -> None:
    when = {"versions": matrix_report.versions(), "date": datetime.date.today().isoformat()}
    try:
        plan, programs, placement = tpu_programs.planned(model, topology, ATTENTION)
    except Misfit as misfit:
        reason = str(misfit).splitlines()[0]
        matrix_report.add(model, topology, when | {"misfit": reason})
        pytest.skip(reason)
    precision = matmul_precision(plan.launch.runner_config.compute_dtype)
    with jax.default_matmul_precision(precision):
        when["digest"] = tpu_programs.digest(programs.values(), placement)
    known = matrix_report.read().get(f"{model} {topology}", {})
    if (known.get("versions"), known.get("digest")) == (when["versions"], when["digest"]):
        check(model, topology, known["faults"])
        pytest.skip("it is in the report, and its programs have not changed since")
    buckets = {step_name(step.bucket): step.bucket for step in plan.steps}
    facts: list[Any] = []
    faults: list[str] = []

    def read(done: int, total: int, compiled: Compiled) -> None:
        facts.append(read_facts(compiled, plan.model.config.num_layers))
        name = compiled.program.name
        if bucket := buckets.get(name):
            step = tpu_programs.read(plan, bucket, compiled.program, compiled.call)
            faults.extend(f"{name}: {fault}" for fault in tpu_programs.faults(step))

    started, used = time.perf_counter(), time.process_time()
    with jax.default_matmul_precision(precision):
        compile_all(programs.values(), CompileWatch(), read, absent=placement.mesh)
    spent = {"cpu_seconds": round(time.process_time() - used, 1)}  # sum of all threads, reading the programs included
    data = as_data(plan, sorted(facts, key=lambda each: list(programs).index(each.name)), time.perf_counter() - started)
    entry = when | {"attention": ATTENTION, "faults": sorted(faults)} | spent | data
    matrix_report.add(model, topology, entry)
    tpu_programs.planned.cache_clear()  # or twenty launches' programs fill 24 GB
    jax.clear_caches()
    check(model, topology, faults)
