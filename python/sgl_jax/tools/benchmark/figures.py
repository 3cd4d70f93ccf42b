"""A run's figures, computed from what came of its requests. Names are those of the JSON that the field's tools write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sgl_jax.tools.benchmark.records import Outcome
from sgl_jax.tools.benchmark.roofline import Roofline

type Figures = dict[str, Any]  # numbers, or None: nothing to compute it from, or the server does not tell


class Latency(NamedTuple):
    title: str
    label: str
    statistics: tuple[str, ...]  # that are reported


LATENCIES = {
    "e2e_latency": Latency("End-to-End Latency", "E2E Latency", ("mean", "median", "p90", "p99")),
    "ttft": Latency("Time to First Token", "TTFT", ("mean", "median", "p99")),
    "tpot": Latency("Time per Output Token (excl. 1st token)", "TPOT", ("mean", "median", "p99")),
    "itl": Latency("Inter-Token Latency", "ITL", ("mean", "median", "p95", "p99", "max")),
}
_PERCENTS = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True)
class ServingRun:
    """One run against a server, complete: what was asked for, what came of each request, and the figures."""

    config: dict[str, Any]  # settings by name, as they go into the JSON
    start_s: float  # on the event loop's clock, which Outcome.sent_s is on as well
    duration_s: float
    outcomes: list[Outcome]  # in the data set's order; only the finished ones when the run was interrupted
    figures: Figures
    shares: dict[str, Any] | None = None  # of the machine, see run_shares; None: no --machine-limits
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each


def compute_figures(
    outcomes: Sequence[Outcome], start_s: float, duration_s: float, count_tokens: Callable[[str], int] | None = None
) -> Figures:
    """Over the requests that succeeded. `count_tokens` gives the tokens of a text, for the retokenized total.

    Throughputs are per second of the run's duration; the greatest is the most tokens within one second, counted from the
    start. Concurrency is the sum of the latencies / duration. Cached is a share of all prompt tokens, 0 to 1. TPOT is a
    request's (latency - TTFT) / (output tokens - 1); ITL is over all gaps of all requests. Latencies are mean_ttft_ms and
    so on, for all of LATENCIES; percentiles interpolate linearly, as numpy's do.
    """
    good = [outcome for outcome in outcomes if outcome.ok]
    inputs = sum(outcome.prompt_len for outcome in good)
    outputs = sum(outcome.output_len for outcome in good)
    cached, hit_rate = _cached(good)

    def per_second(amount: float) -> float:
        return amount / duration_s if duration_s else 0.0

    return {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": None if count_tokens is None else sum(count_tokens(o.text) for o in good),
        "total_cached_tokens": cached,
        "cache_hit_rate": hit_rate,
        "request_throughput": per_second(len(good)),
        "input_throughput": per_second(inputs),
        "output_throughput": per_second(outputs),
        "max_output_tokens_per_s": _peak(good, start_s),
        "total_throughput": per_second(inputs + outputs),
        "concurrency": per_second(sum(outcome.latency_s for outcome in good)),
    } | {
        f"{statistic}_{name}_ms": _milliseconds(values, statistic)
        for name, values in latencies_s(good).items()
        for statistic in LATENCIES[name].statistics
    }


def latencies_s(good: Sequence[Outcome]) -> dict[str, list[float]]:
    """The values behind the latencies, by their names in LATENCIES."""
    return {
        "e2e_latency": [outcome.latency_s for outcome in good],
        "ttft": [outcome.ttft_s for outcome in good if outcome.ttft_s is not None],
        "tpot": [tpot for outcome in good if (tpot := tpot_s(outcome)) is not None],
        "itl": [gap for outcome in good for gap in outcome.itl_s],
    }


def tpot_s(outcome: Outcome) -> float | None:
    """Time per output token after the first."""
    if outcome.ttft_s is None or outcome.output_len < 2:
        return None
    return (outcome.latency_s - outcome.ttft_s) / (outcome.output_len - 1)


def _milliseconds(seconds: Sequence[float], statistic: str) -> float | None:
    if not seconds:
        return None
    return 1e3 * float(np.mean(seconds) if statistic == "mean" else np.percentile(seconds, _PERCENTS[statistic]))


def arrivals(outcome: Outcome) -> tuple[list[float], float]:
    """When something of the answer came, on the loop's clock, and how many tokens each time stands for.

    That is 1 unless the server sent several tokens at once without saying how many: then all count alike.
    """
    if outcome.ttft_s is None:
        return [], 0.0
    times = [float(t) for t in outcome.sent_s + np.cumsum([outcome.ttft_s, *outcome.itl_s])]
    return times, outcome.output_len / len(times)


def _peak(good: Iterable[Outcome], start_s: float) -> float | None:
    seconds: dict[int, float] = {}
    for outcome in good:
        times, tokens = arrivals(outcome)
        for time in times:
            second = int(time - start_s)
            seconds[second] = seconds.get(second, 0.0) + tokens
    return max(seconds.values(), default=None)


def _cached(good: Iterable[Outcome]) -> tuple[int | None, float | None]:
    """Cached tokens, and their share of the prompts' tokens: both as the server counts, where it tells."""
    told = [outcome for outcome in good if outcome.cached_tokens is not None]
    if not told:
        return None, None
    cached = sum(outcome.cached_tokens or 0 for outcome in told)
    prompts = sum(outcome.prompt_len if outcome.prompt_tokens is None else outcome.prompt_tokens for outcome in told)
    return cached, cached / prompts if prompts else 0.0


def compute_shares(
    outcomes: Sequence[Outcome], figures: Figures, duration_s: float, roofline: Roofline
) -> dict[str, Any]:
    """How near the run came to the machine's limits, which were measured just before it.

    Rows are requests past their first token, the mean over the time when there is any; the context of one is its prompt
    and half of its output, the mean; a step takes the mean ITL. Computed are uncached prompt tokens and output tokens.
    """
    streamed = [o for o in outcomes if o.ok and o.ttft_s is not None]
    context = float(np.mean([o.prompt_len + o.output_len / 2 for o in streamed])) if streamed else None
    step_s = (figures["mean_itl_ms"] or 0.0) / 1e3
    computed = figures["total_input_tokens"] - (figures["total_cached_tokens"] or 0) + figures["total_output_tokens"]
    return roofline.run_shares(_decode_rows(streamed), context, step_s, computed, duration_s)


def _decode_rows(streamed: Iterable[Outcome]) -> float | None:
    spans = sorted((o.sent_s + (o.ttft_s or 0.0), o.sent_s + o.latency_s) for o in streamed)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    return sum(end - start for start, end in spans) / busy if busy else None
