"""A serving run as one picture: what happened over its time, and the latencies that came of it.

Drawn without a display. matplotlib is in the extra `bench` and imported only here and in sweep_plot.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.figures import ServingRun
from sgl_jax.benchmark.plot_series import (
    Spread,
    first_tokens,
    gaps,
    in_flight,
    latencies_ms,
    spread,
    time_bins,
    token_rate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for the colour-blind.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#6e6e6e"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_DPI = 120
_STEPS_PER_BIN = 10  # bins hold at least so many tokens of a request, or the rate would show single steps
_MOST_DOTS = 3000
_LATENCY_COLOURS = {"E2E": GREY, "TTFT": BLUE, "TPOT": GREEN, "ITL": ORANGE}


def check_plot(path: Path) -> None:
    """Raises BenchmarkError when no picture can be written there: better before a long run than after it."""
    if path.suffix.lower() != ".png":
        raise BenchmarkError(f"--plot is {path}; it must be a .png file")
    if not path.parent.is_dir():
        raise BenchmarkError(f"--plot is {path}; there is no folder {path.parent}")
    require_matplotlib()


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchmarkError('drawing needs matplotlib: pip install "sgl-jax[bench]"') from error


def plot_run(run: ServingRun, path: Path) -> None:
    """Writes the picture as PNG. Raises BenchmarkError without matplotlib, or when the file cannot be written."""
    check_plot(path)
    save(run_figure(run), path)


def save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=_DPI, format="png")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error


def run_figure(run: ServingRun) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9.5), layout="constrained")
        figure.suptitle(_title(run), x=0.01, ha="left", fontsize=11)
        grid = figure.add_gridspec(4, 2, width_ratios=(1.7, 1))
        rate = figure.add_subplot(grid[0, 0])
        rows = [rate, *(figure.add_subplot(grid[row, 0], sharex=rate) for row in (1, 2, 3))]
        edges = time_bins(run.duration_s, _STEPS_PER_BIN * (run.figures.latency["median_itl_ms"] or 0.0) / 1e3)
        _draw_rate(rows[0], run, edges)
        _draw_in_flight(rows[1], run)
        _draw_ttft(rows[2], run, edges)
        _draw_itl(rows[3], run, edges)
        for axes in rows[:3]:
            axes.tick_params(labelbottom=False)
        rows[3].set_xlabel("time since the start of the run (s)")
        rows[3].set_xlim(-0.01 * run.duration_s, 1.01 * run.duration_s)  # what is sent at 0 is seen beside the axis
        _draw_percentiles(figure.add_subplot(grid[:, 1]), run)
    return figure


def _title(run: ServingRun) -> str:
    config = run.config
    said = [str(config[name]) for name in ("model", "backend", "dataset_name") if config.get(name)]
    said += [f"requests: {len(run.outcomes)}", f"request rate {config.get('request_rate')}"]
    if config.get("max_concurrency"):
        said.append(f"at most {config['max_concurrency']} at a time")
    if run.interrupted:
        said.append("interrupted")
    return "  ·  ".join(said)


def _draw_rate(axes: Axes, run: ServingRun, edges: np.ndarray) -> None:
    axes.set_title("Output throughput")
    axes.set_ylabel("tokens/s")
    axes.stairs(token_rate(run.outcomes, run.start_s, edges), edges, color=BLUE, fill=True, alpha=0.35)
    mean = run.figures.output_throughput
    axes.axhline(mean, color=BLUE, linewidth=1.2, label=f"mean {mean:,.1f}")
    axes.set_ylim(bottom=0)
    plain_numbers(axes.yaxis)
    legend(axes)


def _draw_in_flight(axes: Axes, run: ServingRun) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Requests, as the client sees them")
    axes.set_ylabel("requests")
    found = in_flight(run.outcomes, run.start_s)
    stack = (found.running, found.waiting)
    labels = ("running (streaming)", "waiting for the first token")
    axes.stackplot(found.times, *stack, step="post", labels=labels, colors=(GREEN, ORANGE), alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def _draw_ttft(axes: Axes, run: ServingRun, edges: np.ndarray) -> None:
    axes.set_title("Time to first token, by when the request was sent")
    axes.set_ylabel("ms")
    times, ttfts = first_tokens(run.outcomes, run.start_s)
    every = -(-len(times) // _MOST_DOTS) or 1
    axes.plot(times[::every], ttfts[::every], ".", color=BLUE, markersize=4, alpha=0.5, label="a request")
    _draw_spread(axes, spread(times, ttfts, edges), BLUE, with_p99=False)
    _latency_scale(axes, ttfts)


def _draw_itl(axes: Axes, run: ServingRun, edges: np.ndarray) -> None:
    axes.set_title("Inter-token latency, by when the token came")
    axes.set_ylabel("ms")
    times, itls = gaps(run.outcomes, run.start_s)
    _draw_spread(axes, spread(times, itls, edges), ORANGE, with_p99=True)
    _latency_scale(axes, itls)


def _draw_spread(axes: Axes, found: Spread, colour: str, with_p99: bool) -> None:
    seen = ~np.isnan(found.median)
    if with_p99:
        axes.plot(found.centres[seen], found.p99[seen], "-", color=RED, linewidth=1.2, marker=".", label="p99")
    axes.plot(found.centres[seen], found.median[seen], "-", color=colour, linewidth=1.6, marker=".", label="median")


def _latency_scale(axes: Axes, values: np.ndarray) -> None:
    """From zero, or logarithmic when single values would press the others flat."""
    if not len(values):
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes, color=GREY)
        axes.set_yticks([])
        return
    if np.max(values) > 20 * np.median(values) > 0:
        log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    plain_numbers(axes.yaxis)
    legend(axes)


def legend(axes: Axes) -> None:
    """Above the panel on the right, where no curve is."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, borderaxespad=0.1, handlelength=1.2, columnspacing=1.2
    )


def log_scale(axes: Axes) -> None:
    """On the y axis, with enough numbers also where the values span less than a power of ten."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def plain_numbers(axis: Axis) -> None:
    """2,000 and 0.5, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_percentiles(axes: Axes, run: ServingRun) -> None:
    axes.set_title("Latency percentiles")
    axes.set_xlabel("percentile")
    axes.set_ylabel("ms")
    percents = np.linspace(0, 100, 201)
    found = latencies_ms(run.outcomes)
    for name, values in found.items():
        axes.plot(percents, np.percentile(values, percents), color=_LATENCY_COLOURS[name], linewidth=1.8, label=name)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 90, 99])
    if found:
        log_scale(axes)
        # Tokens that came at once have gaps of microseconds: a scale down to them would press all else flat.
        low = [percentile for values in found.values() if (percentile := np.percentile(values, 10)) > 0]
        axes.set_ylim(bottom=0.7 * min(low, default=1.0))
        plain_numbers(axes.yaxis)
        legend(axes)
