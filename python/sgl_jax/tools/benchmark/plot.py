"""Pictures: a serving run over its time and the latencies that came of it, and a sweep's throughput against latency.

Drawn without a display. matplotlib is in the extra `bench` and imported only to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_jax.tools.benchmark import plot_series as series
from sgl_jax.tools.benchmark.figures import ServingRun
from sgl_jax.tools.benchmark.terminal import BenchmarkError

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
_SPELT = {"TPOT": "time per output token", "TTFT": "time to first token"}


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
    """Writes the picture as PNG. Raises BenchmarkError when the file cannot be written."""
    _save(run_figure(run), path)


def plot_sweep(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`records` are of one ISL and OSL. Raises BenchmarkError when the file cannot be written."""
    _save(sweep_figure(records), path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=_DPI, format="png")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error


# --- a run ------------------------------------------------------------------------------------------------------------


def run_figure(run: ServingRun) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9.5), layout="constrained")
        figure.suptitle(_title(run), x=0.01, ha="left", fontsize=11)
        grid = figure.add_gridspec(4, 2, width_ratios=(1.7, 1))
        rate = figure.add_subplot(grid[0, 0])
        rows = [rate, *(figure.add_subplot(grid[row, 0], sharex=rate) for row in (1, 2, 3))]
        edges = series.time_bins(run.duration_s, _STEPS_PER_BIN * (run.figures["median_itl_ms"] or 0.0) / 1e3)
        _draw_rate(rows[0], run, edges)
        _draw_in_flight(rows[1], run)
        _draw_ttft(rows[2], run, edges)
        _draw_itl(rows[3], run, edges)
        for axes in rows[:3]:
            axes.tick_params(labelbottom=False)
        shown = (-0.01 * run.duration_s, 1.01 * run.duration_s)  # what is sent at 0 is seen beside the axis
        rows[3].set(xlabel="time since the start of the run (s)", xlim=shown)
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


def _draw_rate(axes: Axes, run: ServingRun, edges: series.Curve) -> None:
    axes.set(title="Output throughput", ylabel="tokens/s")
    axes.stairs(series.token_rate(run.outcomes, run.start_s, edges), edges, color=BLUE, fill=True, alpha=0.35)
    mean = run.figures["output_throughput"]
    axes.axhline(mean, color=BLUE, linewidth=1.2, label=f"mean {mean:,.1f}")
    axes.set_ylim(bottom=0)
    _plain_numbers(axes.yaxis)
    _legend(axes)


def _draw_in_flight(axes: Axes, run: ServingRun) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(title="Requests, as the client sees them", ylabel="requests")
    times, waiting, running = series.in_flight(run.outcomes, run.start_s)
    labels = ("running (streaming)", "waiting for the first token")
    axes.stackplot(times, running, waiting, step="post", labels=labels, colors=(GREEN, ORANGE), alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _draw_ttft(axes: Axes, run: ServingRun, edges: series.Curve) -> None:
    axes.set(title="Time to first token, by when the request was sent", ylabel="ms")
    times, ttfts = series.first_tokens(run.outcomes, run.start_s)
    every = -(-len(times) // _MOST_DOTS) or 1
    axes.plot(times[::every], ttfts[::every], ".", color=BLUE, markersize=4, alpha=0.5, label="a request")
    _draw_bins(axes, series.spread(times, ttfts, edges), "median", BLUE)
    _latency_scale(axes, ttfts)


def _draw_itl(axes: Axes, run: ServingRun, edges: series.Curve) -> None:
    axes.set(title="Inter-token latency, by when the token came", ylabel="ms")
    times, itls = series.gaps(run.outcomes, run.start_s)
    found = series.spread(times, itls, edges)
    _draw_bins(axes, found, "p99", RED)
    _draw_bins(axes, found, "median", ORANGE)
    _latency_scale(axes, itls)


def _draw_bins(axes: Axes, found: series.Spread, name: str, colour: str) -> None:
    seen = ~np.isnan(found.median)
    axes.plot(found.centres[seen], getattr(found, name)[seen], ".-", color=colour, linewidth=1.4, label=name)


def _latency_scale(axes: Axes, values: series.Curve) -> None:
    """From zero, or logarithmic when single values would press the others flat."""
    if not len(values):
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes, color=GREY)
        axes.set_yticks([])
        return
    if np.max(values) > 20 * np.median(values) > 0:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    _plain_numbers(axes.yaxis)
    _legend(axes)


def _draw_percentiles(axes: Axes, run: ServingRun) -> None:
    axes.set(title="Latency percentiles", xlabel="percentile", ylabel="ms")
    percents = np.linspace(0, 100, 201)
    found = series.latencies_ms(run.outcomes)
    for name, values in found.items():
        axes.plot(percents, np.percentile(values, percents), color=_LATENCY_COLOURS[name], linewidth=1.8, label=name)
    axes.set(xlim=(0, 100), xticks=[0, 25, 50, 75, 90, 99])
    if found:
        _log_scale(axes)
        # Tokens that came at once have gaps of microseconds: a scale down to them would press all else flat.
        low = [percentile for values in found.values() if (percentile := np.percentile(values, 10)) > 0]
        axes.set_ylim(bottom=0.7 * min(low, default=1.0))
        _plain_numbers(axes.yaxis)
        _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the panel on the right, where no curve is."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "borderaxespad": 0.1}
    axes.legend(**place, ncols=4, handlelength=1.2, columnspacing=1.2)


def _log_scale(axes: Axes) -> None:
    """On the y axis, with enough numbers also where the values span less than a power of ten."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _plain_numbers(axis: Axis) -> None:
    """2,000 and 0.5, not powers of ten."""
    from matplotlib.ticker import NullFormatter

    axis.set_major_formatter(lambda value, place: f"{value:,.10g}")
    axis.set_minor_formatter(NullFormatter())


# --- a sweep: one picture per ISL and OSL, a point per concurrency -----------------------------------------------------


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """By latency, its points: (concurrency, median latency in ms, tokens/s), concurrency rising.

    The tokens are generated ones, or those of the prompts when OSL is 1: such a case measures prefill, and has no TPOT.
    """
    found = {}
    for latency in ("TPOT", "TTFT"):
        x, y = f"median_{latency.lower()}_ms", f"{_counted(records)}_throughput"
        points = [(each["max_concurrency"], each[x], each[y]) for each in records if each.get(x) is not None]
        if points:
            found[latency] = sorted(points)
    return found


def _counted(records: Sequence[Mapping[str, Any]]) -> str:
    return "input" if records[0]["osl"] == 1 else "output"


def sweep_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    found = curves(records)
    first = records[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0 * max(len(found), 1), 4.8), layout="constrained")
        named = [str(first[name]) for name in ("model", "backend") if first.get(name)]
        title = "  ·  ".join([f"ISL {first['isl']}, OSL {first['osl']}", *named])
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for place, (latency, points) in enumerate(found.items(), 1):
            axes = figure.add_subplot(1, len(found), place)
            axes.set(
                title=f"Throughput against {_SPELT[latency]}",
                xlabel=f"median {latency} (ms)",
                ylabel=f"{_counted(records)} throughput (tokens/s)",
            )
            _draw_points(axes, points, _LATENCY_COLOURS[latency])
    return figure


def _draw_points(axes: Axes, points: Sequence[tuple[int, float, float]], colour: str) -> None:
    concurrencies, xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, "o-", color=colour, linewidth=1.6, markersize=5)
    for concurrency, x, y in zip(concurrencies, xs, ys, strict=True):
        # Above on the left, where a curve that rises to the right is not.
        axes.annotate(f"{concurrency}", (x, y), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8.5)
    axes.text(0.98, 0.03, "numbers at the points: requests at a time", ha="right", transform=axes.transAxes, fontsize=8)
    axes.set(xlim=(-0.04 * max(xs), 1.08 * max(xs)), ylim=(0, 1.12 * max(ys)))
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
