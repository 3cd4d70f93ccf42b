"""The engine thread's work per decode step stays small: a bound far above the benchmark's numbers, to catch a slip."""

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("overlap", [True, False])
def test_a_steady_decode_step_of_256_rows_costs_the_host_little(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    step_overhead = importlib.import_module("step_overhead")
    times = step_overhead.measure(256, 300, overlap=overlap)
    assert np.median(times) <= 1500, f"{np.median(times):.0f} us; the bar is 300, see benchmarks/step_overhead.json"
