"""Throughput against latency, one picture per ISL and OSL of a sweep; a point per concurrency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_jax.benchmark.plot import BLUE, GREEN, STYLE, plain_numbers, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

type Record = Mapping[str, Any]

_SPELT = {"TPOT": "time per output token", "TTFT": "time to first token"}


def curves(records: Sequence[Record]) -> dict[str, list[tuple[int, float, float]]]:
    """By latency, its points: (concurrency, median latency in ms, tokens/s), concurrency rising.

    The tokens are generated ones, or those of the prompts when OSL is 1: such a case measures prefill, and has no TPOT.
    """
    throughput = _throughput(records)
    found = {}
    for latency in ("TPOT", "TTFT"):
        field = f"median_{latency.lower()}_ms"
        points = [(r["max_concurrency"], r[field], r[throughput]) for r in records if r.get(field) is not None]
        if points:
            found[latency] = sorted(points)
    return found


def plot_sweep(records: Sequence[Record], path: Path) -> None:
    """`records` are of one ISL and OSL. Raises BenchmarkError when the PNG cannot be written."""
    save(sweep_figure(records), path)


def sweep_figure(records: Sequence[Record]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    found = curves(records)
    first = records[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0 * max(len(found), 1), 4.8), layout="constrained")
        title = f"ISL {first['isl']}, OSL {first['osl']}"
        named = [str(first[name]) for name in ("model", "backend") if first.get(name)]
        figure.suptitle("  ·  ".join([title, *named]), x=0.01, ha="left", fontsize=11)
        for place, (latency, points) in enumerate(found.items(), 1):
            axes = figure.add_subplot(1, len(found), place)
            _draw(axes, latency, points, "input" if _throughput(records) == "input_throughput" else "output")
    return figure


def _throughput(records: Sequence[Record]) -> str:
    return "input_throughput" if records[0]["osl"] == 1 else "output_throughput"


def _draw(axes: Axes, latency: str, points: Sequence[tuple[int, float, float]], tokens: str) -> None:
    axes.set_title(f"Throughput against {_SPELT[latency]}")
    axes.set_xlabel(f"median {latency} (ms)")
    axes.set_ylabel(f"{tokens} throughput (tokens/s)")
    colour = {"TPOT": GREEN, "TTFT": BLUE}[latency]
    axes.plot([x for _, x, _ in points], [y for *_, y in points], "o-", color=colour, linewidth=1.6, markersize=5)
    for concurrency, x, y in points:
        # Above on the left, where a curve that rises to the right is not.
        axes.annotate(f"{concurrency}", (x, y), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8.5)
    axes.text(0.98, 0.03, "numbers at the points: requests at a time", ha="right", transform=axes.transAxes, fontsize=8)
    longest = max(x for _, x, _ in points)
    axes.set_xlim(-0.04 * longest, 1.08 * longest)
    axes.set_ylim(0, 1.12 * max(y for *_, y in points))
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
