"""benchmarks/plot.py: curves and points to the digit, and PNG files of a readable size."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from sgl_jax.tools.benchmark.figures import ServingRun, compute_figures
from sgl_jax.tools.benchmark.protocols import Outcome

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
import plot

START = 100.0


def answered(sent: float, ttft: float, *itls: float) -> Outcome:
    """A request that was sent `sent` seconds after the start."""
    outcome = Outcome(8, START + sent, ttft_s=ttft, itl_s=list(itls), output_len=1 + len(itls))
    outcome.latency_s = ttft + sum(itls)
    return outcome


FAILED = Outcome(8, START + 0.5, error="HTTP 500")
# Tokens at 0.5, 1, 1.5 and at 1.25, 2.25, 3.75.
OUTCOMES = [answered(0.0, 0.5, 0.5, 0.5), answered(0.25, 1.0, 1.0, 1.5), FAILED]


def result(outcomes: list[Outcome], details: bool = True, **changed: Any) -> dict[str, Any]:
    """A line of a results file, as it is read."""
    config = {"backend": "sgl-jax", "model": "tiny", "random_input_len": 8, "random_output_len": 3}
    config |= {"max_concurrency": 2} | changed
    run = ServingRun(config, START, outcomes, compute_figures(outcomes, START, 4.0))
    return json.loads(json.dumps(run.json(details)))


def test_a_run_over_its_time() -> None:
    figure = plot.draw_run(result(OUTCOMES))
    assert figure.get_suptitle() == "tiny  ·  sgl-jax  ·  requests: 3"
    rate, ttft, itl = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens/s", "ms", "ms"]
    values, edges, _ = rate.patches[0].get_data()
    assert (len(values), edges[-1], sum(values) * 0.1) == (plot.BINS, 4.0, pytest.approx(6))
    assert values[5] == pytest.approx(10), "a token at 0.5 s, in a bin of 0.1 s"
    assert ttft.lines[0].get_xydata().tolist() == [[0.0, 500.0], [0.25, 1000.0]]
    assert itl.lines[0].get_xydata().tolist() == [[1.0, 500.0], [1.5, 500.0], [2.25, 1000.0], [3.75, 1500.0]]


def test_throughput_against_latency_has_a_point_per_concurrency() -> None:
    one, two = answered(0.0, 0.5, 0.5, 0.5), answered(0.25, 1.0, 1.0, 1.5)
    found = plot.curves([result([one, two], max_concurrency=2), result([one], max_concurrency=1)])
    assert found == {"TPOT": [(1, 500.0, 0.75), (2, 875.0, 1.5)], "TTFT": [(1, 500.0, 0.75), (2, 750.0, 1.5)]}


def test_of_one_token_the_prompts_are_counted() -> None:
    """Such a case measures prefill, and has no TPOT."""
    first = answered(0.0, 0.5)
    assert plot.curves([result([first], random_output_len=1)]) == {"TTFT": [(2, 500.0, 2.0)]}


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        found[path.name] = struct.unpack(">II", content[16:24])
    return found


def test_a_file_of_results_becomes_pictures_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        result(OUTCOMES),
        result([FAILED]),
        result([answered(0.0, 0.5)], details=False, random_output_len=1),
        result([answered(0.0, 0.5)], details=False, random_output_len=2, max_concurrency=None),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    plot.main([str(file)])
    run, small, none = (1560, 576), (720, 576), (720, 576)
    assert sizes(tmp_path) == {"run1.png": run, "run2.png": run, "isl8_osl1.png": small, "isl8_osl3.png": none}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        committed = Path(plot.__file__).with_name(f"serve_smollm2_{dtype}") / "results.jsonl"
        (tmp_path / "results.jsonl").write_text(committed.read_text())
        plot.main([str(tmp_path / "results.jsonl")])
        assert sizes(tmp_path) == {"isl128_osl64.png": (1440, 576)}
