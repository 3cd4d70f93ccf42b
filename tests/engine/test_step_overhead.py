"""The engine thread's work per decode step stays small: counted, not timed, so that a slip shows on a busy machine too.

It is counted by this file as a program, because the types of arrays are checked in the process of the tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from sgl_jax.engine.core import Core

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = 64  # whole pages, so that every count of steps has its share of new pages
# Limits of a step of 256 rows, which takes 150 us on the machine of benchmarks/step_overhead.json; the bar is 300.
INSTRUCTIONS = 3380  # executed by Python's interpreter
C_CALLS = 110  # mostly into numpy


def count_work(core: Core) -> tuple[float, float]:
    """Python instructions and calls of C functions per step."""
    instructions = c_calls = 0

    def on_instruction(code: CodeType, offset: int) -> None:
        nonlocal instructions
        instructions += 1

    def on_event(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal c_calls
        c_calls += event == "c_call"

    monitoring = sys.monitoring
    monitoring.use_tool_id(monitoring.PROFILER_ID, "test_step_overhead")
    monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION, on_instruction)
    try:
        monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION)
        for _ in range(STEPS):
            core.step()
    finally:
        monitoring.set_events(monitoring.PROFILER_ID, 0)
        monitoring.free_tool_id(monitoring.PROFILER_ID)
    sys.setprofile(on_event)
    try:
        for _ in range(STEPS):
            core.step()
    finally:
        sys.setprofile(None)
    return instructions / STEPS, c_calls / STEPS


def main() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    from step_overhead import steady_core

    found = {}
    for overlap in (True, False):
        core = steady_core(256, 3 * STEPS, overlap=overlap)
        for _ in range(20):
            core.step()
        found[f"overlap {overlap}"] = count_work(core)
    print(json.dumps(found))


def test_a_steady_decode_step_of_256_rows_costs_the_host_little() -> None:
    counted = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=True).stdout
    for instructions, c_calls in json.loads(counted).values():
        assert instructions == pytest.approx(INSTRUCTIONS, rel=0.1), "set INSTRUCTIONS anew if this is meant"
        assert c_calls == pytest.approx(C_CALLS, rel=0.1), "set C_CALLS anew if this is meant"


if __name__ == "__main__":
    main()
