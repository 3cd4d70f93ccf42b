"""The picture of a run: its curves to the digit, and a PNG that says what they are."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sgl_jax.bench_serving import main
from sgl_jax.tools.benchmark import plot
from sgl_jax.tools.benchmark.figures import ServingRun, compute_figures, compute_shares
from sgl_jax.tools.benchmark.plot_series import (
    first_tokens,
    gaps,
    in_flight,
    latencies_ms,
    spread,
    time_bins,
    token_rate,
)
from sgl_jax.tools.benchmark.records import Outcome
from sgl_jax.tools.benchmark.roofline import MachineLimits, ModelCost, Roofline
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


def test_bins_are_round_and_end_with_the_run() -> None:
    assert time_bins(60.0).tolist() == [float(second) for second in range(61)]
    assert time_bins(100.0).tolist() == [float(second) for second in range(0, 101, 2)]
    assert np.allclose(time_bins(0.5), [k / 100 for k in range(51)])
    assert time_bins(4.4, finest_s=1.0).tolist() == [0.0, 1.0, 2.0, 3.0, 4.4]  # a short rest joins its neighbour
    assert time_bins(4.6, finest_s=1.0).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 4.6]
    assert len(time_bins(80.0, finest_s=1000.0)) == 9
    assert time_bins(0.0)[0] == 0.0


def test_throughput_is_tokens_per_second_of_each_bin() -> None:
    assert token_rate(OUTCOMES, START, np.array([0.0, 1.0, 2.0, 4.0])).tolist() == [1.0, 3.0, 1.0]


def test_tokens_that_came_without_a_count_share_the_answers_length() -> None:
    one_event = answered(0.0, 0.5)
    one_event.output_len = 6
    assert token_rate([one_event], START, np.array([0.0, 1.0, 2.0])).tolist() == [6.0, 0.0]


def test_requests_wait_until_their_first_token_and_run_until_their_end() -> None:
    times, waiting, running = in_flight(OUTCOMES, START)
    assert times.tolist() == [0.0, 0.25, 0.5, 1.25, 1.5, 3.75]
    assert waiting.tolist() == [1, 2, 1, 0, 0, 0]  # the failed one is over when it was sent
    assert running.tolist() == [0, 0, 1, 2, 1, 0]


def test_a_request_that_is_not_streamed_only_waits() -> None:
    whole = Outcome(8, START + 1, output_len=4, latency_s=2.0)
    times, waiting, running = in_flight([whole], START)
    assert (times.tolist(), waiting.tolist(), running.tolist()) == ([1.0, 3.0], [1, 0], [0, 0])


def test_ttft_is_at_the_time_of_sending_and_itl_at_the_tokens() -> None:
    times, ttfts = first_tokens(OUTCOMES, START)
    assert (times.tolist(), ttfts.tolist()) == ([0.0, 0.25], [500.0, 1000.0])
    times, itls = gaps(OUTCOMES, START)
    assert (times.tolist(), itls.tolist()) == ([1.0, 1.5, 2.25, 3.75], [500.0, 500.0, 1000.0, 1500.0])


def test_the_spread_of_a_bin_is_its_values_median_and_p99() -> None:
    times, values = np.array([0.0, 0.1, 0.2, 2.0]), np.array([1.0, 2.0, 101.0, 7.0])
    found = spread(times, values, np.array([0.0, 1.0, 1.5, 2.0]))
    assert found.centres.tolist() == [0.5, 1.25, 1.75]
    assert found.median.tolist() == pytest.approx([2.0, float("nan"), 7.0], nan_ok=True)
    assert found.p99.tolist() == pytest.approx([2.0 + 0.98 * 99, float("nan"), 7.0], nan_ok=True)


def test_the_values_behind_the_percentiles_are_those_that_succeeded() -> None:
    found = {name: values.tolist() for name, values in latencies_ms(OUTCOMES).items()}
    assert found == {
        "E2E": [1500.0, 3500.0],
        "TTFT": [500.0, 1000.0],
        "TPOT": [500.0, 1250.0],
        "ITL": [500.0, 500.0, 1000.0, 1500.0],
    }
    assert latencies_ms([FAILED]) == {}


# --- the picture ------------------------------------------------------------------------------------------------------


def served(outcomes: list[Outcome], **config: object) -> ServingRun:
    figures = compute_figures(outcomes, START, 4.0)
    limits = MachineLimits(1.0, 0.01, "float32", "cpu", 1)
    roofline = Roofline(limits, ModelCost(1_000_000, 1000, 500_000))
    shares = compute_shares(outcomes, figures, 4.0, roofline)
    described = {"backend": "sgl-jax", "model": "tiny", "dataset_name": "random", "request_rate": "inf"} | config
    return ServingRun(described, START, 4.0, outcomes, figures, shares)


def test_panels_have_titles_and_units() -> None:
    figure = plot.run_figure(served(OUTCOMES, max_concurrency=2))
    suptitle = figure.get_suptitle()
    assert suptitle == "tiny  ·  sgl-jax  ·  random  ·  requests: 3  ·  request rate inf  ·  at most 2 at a time"
    panels = [(axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert panels == [
        ("Output throughput", "", "tokens/s"),
        ("Requests, as the client sees them", "", "requests"),
        ("Time to first token, by when the request was sent", "", "ms"),
        ("Inter-token latency, by when the token came", "time since the start of the run (s)", "ms"),
        ("Latency percentiles", "percentile", "ms"),
    ]
    legends = [[each.get_text() for each in axes.get_legend().texts] for axes in figure.axes if axes.get_legend()]
    assert legends == [
        ["mean 1.5"],
        ["running (streaming)", "waiting for the first token"],
        ["a request", "median"],
        ["p99", "median"],
        ["E2E", "TTFT", "TPOT", "ITL"],
    ]


def test_nothing_is_written_over_anything_else() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot.run_figure(served(OUTCOMES))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, *(axes.texts[0] for axes in figure.axes if axes.texts)]
    texts += [axes._left_title for axes in figure.axes if axes._left_title.get_text()]
    texts += [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    texts += [each for axes in figure.axes if axes.axison for each in (axes.xaxis.label, axes.yaxis.label)]
    boxes = [text.get_window_extent(renderer) for text in texts]
    boxes = [box for box in boxes if box.width and box.height]
    assert len(boxes) > 15
    assert [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)] == []
    width, height = canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


@pytest.mark.parametrize("outcomes", [OUTCOMES, [FAILED]], ids=["answered", "all failed"])
def test_the_file_is_a_png_of_readable_size(outcomes: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    plot.plot_run(served(outcomes), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1560, 1140)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchmarkError, match=r'pip install "sgl-jax\[bench\]"'):
        plot.check_plot(tmp_path / "run.png")


def test_a_place_where_nothing_can_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"run.pdf; it must be a .png file"):
        plot.check_plot(tmp_path / "run.pdf")
    with pytest.raises(BenchmarkError, match="there is no folder"):
        plot.check_plot(tmp_path / "none" / "run.png")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    check = "import sys, sgl_jax.tools.benchmark.plot; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "False\n"


def test_bench_serving_says_what_is_missing_before_it_asks_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--base-url", "http://127.0.0.1:1", "--plot", str(tmp_path / "run.png")]) == 2
    assert capsys.readouterr().err == 'bench_serving: error: drawing needs matplotlib: pip install "sgl-jax[bench]"\n'
