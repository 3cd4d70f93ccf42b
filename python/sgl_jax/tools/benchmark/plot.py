"""Pictures: a serving run over its time and its latencies, and a sweep's throughput against latency.

Drawn without a display. matplotlib is in the extra `bench` and imported only to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sgl_jax.tools.benchmark.figures import ServingRun, arrivals, latencies_s
from sgl_jax.tools.benchmark.protocols import Outcome
from sgl_jax.tools.benchmark.terminal import BenchmarkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

type Curve = np.ndarray  # float64, one value per point of a time axis, in seconds from the run's start

_BINS = 40
_TIME = "time since the start of the run (s)"
_SPELT = {"TPOT": "time per output token", "TTFT": "time to first token"}


def check_plot(path: Path) -> None:
    """Check the path. Raises BenchmarkError when no picture can be written there: better before a long run than after it."""
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


def save(figure: Figure, path: Path) -> None:
    """Write the picture as PNG. Raises BenchmarkError when the file cannot be written."""
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from error


def token_rate(outcomes: Sequence[Outcome], start_s: float, edges: Curve) -> Curve:
    """Return output tokens per second in each bin."""
    came = [arrivals(outcome) for outcome in outcomes]
    times = [time - start_s for times, _ in came for time in times]
    tokens = [each for times, each in came for _ in times]
    return np.histogram(times, edges, weights=tokens)[0] / np.diff(edges)


def run_figure(run: ServingRun) -> Figure:
    """Draw throughput, TTFT by when a request was sent, ITL by when a token came, and percentiles of all latencies."""
    from matplotlib.figure import Figure

    good, start = [outcome for outcome in run.outcomes if outcome.ok], run.start_s
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    config = [run.config.get(name) for name in ("model", "backend", "dataset_name", "request_rate")]
    figure.suptitle("  ·  ".join([*(str(each) for each in config if each), f"requests: {len(run.outcomes)}"]))
    (rate, ttft), (percentiles, itl) = figure.subplots(2, 2)
    edges = np.linspace(0, max(run.duration_s, 1e-6), _BINS + 1)
    rate.set(title="Output throughput", ylabel="tokens/s", xlabel=_TIME)
    rate.stairs(token_rate(good, start, edges), edges, fill=True)
    ttft.set(title="Time to first token, by when the request was sent", ylabel="ms", xlabel=_TIME)
    ttft.plot(*_points((o.sent_s - start, o.ttft_s) for o in good if o.ttft_s is not None), ".")
    itl.set(title="Inter-token latency, by when the token came", ylabel="ms", xlabel=_TIME)
    gaps = (each for o in good for each in zip(arrivals(o)[0][1:], o.itl_s, strict=True))
    itl.plot(*_points((came - start, gap) for came, gap in gaps), ".", markersize=2)
    percents = np.linspace(0, 100, 201)
    percentiles.set(title="Latency percentiles", xlabel="percentile", ylabel="ms", yscale="log")
    for name, values in latencies_s(good).items():
        if values:
            percentiles.plot(
                percents, 1e3 * np.percentile(values, percents), label=name.removesuffix("_latency").upper()
            )
    if good:
        percentiles.legend()
    return figure


def _points(found: Iterable[tuple[float, float]]) -> Curve:
    """Return times in seconds and values in ms, from pairs in seconds."""
    return np.array(list(found)).reshape(-1, 2).T * [[1], [1e3]]


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """Return the points by latency: (concurrency, median latency in ms, tokens/s), concurrency rising.

    The tokens are generated ones, or those of the prompts when OSL is 1: such a case measures prefill, and has no TPOT.
    """
    y = f"{_counted(records)}_throughput"
    found = {}
    for latency in _SPELT:
        x = f"median_{latency.lower()}_ms"
        points = [(each["max_concurrency"], each[x], each[y]) for each in records if each.get(x) is not None]
        found |= {latency: sorted(points)} if points else {}
    return found


def _counted(records: Sequence[Mapping[str, Any]]) -> str:
    return "input" if records[0]["osl"] == 1 else "output"


def sweep_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw throughput against median latencies, a point per concurrency. `records` are of one ISL and OSL."""
    from matplotlib.figure import Figure

    found, first = curves(records), records[0]
    figure = Figure(figsize=(6.0 * max(len(found), 1), 4.8), layout="constrained")
    figure.suptitle(
        f"ISL {first['isl']}, OSL {first['osl']}  ·  {first.get('model')}  ·  requests at a time: at the points"
    )
    for place, (latency, points) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), place)
        axes.set(title=f"Throughput against {_SPELT[latency]}", xlabel=f"median {latency} (ms)")
        axes.set_ylabel(f"{_counted(records)} throughput (tokens/s)")
        concurrencies, xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "o-")
        for concurrency, x, y in zip(concurrencies, xs, ys, strict=True):
            axes.annotate(f"{concurrency}", (x, y), xytext=(-4, 5), textcoords="offset points", ha="right")
        axes.set(xlim=(0, 1.08 * max(xs)), ylim=(0, 1.12 * max(ys)))
    return figure
