"""A run as curves over its time, computed from what came of its requests; drawing is plot.py's.

Times are seconds from the run's start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgl_jax.tools.benchmark.figures import arrivals, latencies_s
from sgl_jax.tools.benchmark.records import Outcome

type Curve = np.ndarray  # float64, one value per point of a time axis

_MOST_BINS, _FEWEST_BINS = 60, 8
_STEPS = (1.0, 2.0, 5.0, 10.0)


class Spread(NamedTuple):
    """Median and 99th percentile of the values in each bin, NaN where a bin has none; `centres` are the bins'."""

    centres: Curve
    median: Curve
    p99: Curve


def time_bins(duration_s: float, finest_s: float = 0.0) -> Curve:
    """Edges from 0 to `duration_s`: at most sixty bins of 1, 2 or 5 x 10^k seconds; the last takes what is left over.

    None is finer than `finest_s`, unless there would be fewer than eight.
    """
    least = max(duration_s / _MOST_BINS, min(finest_s, duration_s / _FEWEST_BINS), 1e-6)
    power = 10.0 ** math.floor(math.log10(least))
    width = power * next(step for step in _STEPS if power * step >= least * (1 - 1e-9))
    count = max(math.floor(duration_s / width + 0.5), 1)
    return np.append(np.arange(count) * width, max(duration_s, 1e-6))


def token_rate(outcomes: Sequence[Outcome], start_s: float, edges: Curve) -> Curve:
    """Output tokens per second in each bin, of the requests that succeeded."""
    times, tokens = [], []
    for outcome in filter(lambda outcome: outcome.ok, outcomes):
        came, each = arrivals(outcome)
        times += came
        tokens += [each] * len(came)
    counts, _ = np.histogram(np.array(times) - start_s, edges, weights=np.array(tokens))
    return counts / np.diff(edges)


def in_flight(outcomes: Sequence[Outcome], start_s: float) -> tuple[Curve, Curve, Curve]:
    """(times, waiting, running): requests the client has sent and not seen the end of, each count from its time to the next.

    A request waits from being sent until its first token, and runs until its end; without tokens it only waits.
    """
    changes = []  # (time, waiting, running)
    for outcome in outcomes:
        sent = outcome.sent_s - start_s
        end = sent + max(outcome.latency_s, (outcome.ttft_s or 0.0) + sum(outcome.itl_s))
        first = end if outcome.ttft_s is None else sent + outcome.ttft_s
        changes += [(sent, 1, 0), (first, -1, 1), (end, 0, -1)]
    table = np.array(sorted(changes), dtype=float).reshape(-1, 3)
    times, last = np.unique(table[::-1, 0], return_index=True)
    counts = np.cumsum(table[:, 1:], axis=0)[len(table) - 1 - last]  # after all changes at that time
    return times, counts[:, 0], counts[:, 1]


def first_tokens(outcomes: Sequence[Outcome], start_s: float) -> tuple[Curve, Curve]:
    """When each request was sent, and its TTFT in ms."""
    found = [(o.sent_s - start_s, o.ttft_s * 1e3) for o in outcomes if o.ttft_s is not None]
    times, ttfts = np.array(sorted(found), dtype=float).reshape(-1, 2).T
    return times, ttfts


def gaps(outcomes: Sequence[Outcome], start_s: float) -> tuple[Curve, Curve]:
    """When each token after a request's first came, and its ITL in ms."""
    times = [time - start_s for outcome in outcomes for time in arrivals(outcome)[0][1:]]
    return np.array(times), np.array([gap * 1e3 for outcome in outcomes for gap in outcome.itl_s])


def spread(times: Curve, values: Curve, edges: Curve) -> Spread:
    bins = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 2)
    median, p99 = np.full((2, len(edges) - 1), np.nan)
    for number in np.unique(bins):
        median[number], p99[number] = np.percentile(values[bins == number], (50, 99))
    return Spread((edges[:-1] + edges[1:]) / 2, median, p99)


def latencies_ms(outcomes: Sequence[Outcome]) -> dict[str, Curve]:
    """The values behind the run's percentiles, by what they are called; without those there are none of."""
    names = {"e2e_latency": "E2E", "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL"}
    seconds = latencies_s([outcome for outcome in outcomes if outcome.ok])
    return {names[name]: np.array(values) * 1e3 for name, values in seconds.items() if values}
