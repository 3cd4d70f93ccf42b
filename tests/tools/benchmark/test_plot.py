"""The picture of a run: its curves to the digit, and a PNG that says what they are."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from sgl_jax.bench_serving import main
from sgl_jax.tools.benchmark import plot
from sgl_jax.tools.benchmark.figures import ServingRun, compute_figures
from sgl_jax.tools.benchmark.plot import token_rate
from sgl_jax.tools.benchmark.protocols import Outcome
from sgl_jax.tools.benchmark.terminal import BenchmarkError

START = 100.0


def answered(sent: float, ttft: float, *itls: float) -> Outcome:
    """A request that was sent `sent` seconds after the start."""
    outcome = Outcome(8, START + sent, ttft_s=ttft, itl_s=list(itls), output_len=1 + len(itls))
    outcome.latency_s = ttft + sum(itls)
    return outcome


FAILED = Outcome(8, START + 0.5, error="HTTP 500")
# Tokens at 0.5, 1, 1.5 and at 1.25, 2.25, 3.75.
OUTCOMES = [answered(0.0, 0.5, 0.5, 0.5), answered(0.25, 1.0, 1.0, 1.5), FAILED]


def test_throughput_is_tokens_per_second_of_each_bin() -> None:
    assert token_rate(OUTCOMES[:2], START, np.array([0.0, 1.0, 2.0, 4.0])).tolist() == [1.0, 3.0, 1.0]


# --- the picture ------------------------------------------------------------------------------------------------------


def served(outcomes: list[Outcome]) -> ServingRun:
    described = {"backend": "sgl-jax", "model": "tiny", "dataset_name": "random", "request_rate": "inf"}
    return ServingRun(described, START, 4.0, outcomes, compute_figures(outcomes, START, 4.0))


def test_panels_have_titles_and_values() -> None:
    figure = plot.run_figure(served(OUTCOMES))
    assert figure.get_suptitle() == "tiny  ·  sgl-jax  ·  random  ·  inf  ·  requests: 3"
    rate, ttft, percentiles, itl = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["tokens/s", "ms", "ms", "ms"]
    assert ttft.lines[0].get_xydata().tolist() == [[0.0, 500.0], [0.25, 1000.0]]
    assert itl.lines[0].get_xydata().tolist() == [[1.0, 500.0], [1.5, 500.0], [2.25, 1000.0], [3.75, 1500.0]]
    assert [each.get_text() for each in percentiles.get_legend().texts] == ["E2E", "TTFT", "TPOT", "ITL"]
    assert rate.get_title() == "Output throughput"


@pytest.mark.parametrize("outcomes", [OUTCOMES, [FAILED]], ids=["answered", "all failed"])
def test_the_file_is_a_png_of_readable_size(outcomes: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    plot.save(plot.run_figure(served(outcomes)), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1560, 1140)


def test_a_place_where_nothing_can_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"run.pdf; it must be a .png file"):
        plot.check_plot(tmp_path / "run.pdf")
    with pytest.raises(BenchmarkError, match="there is no folder"):
        plot.check_plot(tmp_path / "none" / "run.png")


def test_bench_serving_says_what_is_missing_before_it_asks_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--base-url", "http://127.0.0.1:1", "--plot", str(tmp_path / "run.png")]) == 2
    assert capsys.readouterr().err == 'bench_serving: error: drawing needs matplotlib: pip install "sgl-jax[bench]"\n'
