"""A run's figures, computed from its outcomes, and its report. Names in JSON are those that the field's tools write."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np

from sgl_jax.tools.benchmark.machine_limits import Roofline
from sgl_jax.tools.benchmark.protocols import Outcome
from sgl_jax.tools.benchmark.terminal import block

LATENCIES = {  # title, label and reported statistics
    "e2e_latency": ("End-to-End Latency", "E2E Latency", ("mean", "median", "p90", "p99")),
    "ttft": ("Time to First Token", "TTFT", ("mean", "median", "p99")),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT", ("mean", "median", "p99")),
    "itl": ("Inter-Token Latency", "ITL", ("mean", "median", "p95", "p99", "max")),
}
_PERCENTS = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
_LABELS = {  # labels of all tools' figures, in the order of their blocks
    "completed": "Successful requests",
    "successful_requests": "Successful requests",
    "duration": "Benchmark duration (s)",
    "total_latency": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "total_output_tokens_retokenized": "Total generated tokens (retokenized)",
    "total_cached_tokens": "Total cached tokens",
    "cache_hit_rate": "Cache hit rate",
    "last_gen_throughput": "Last generation throughput (tok/s)",
    "request_throughput": "Request throughput (req/s)",
    "input_throughput": "Input token throughput (tok/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "total_throughput": "Total token throughput (tok/s)",
    "concurrency": "Concurrency",
    "accept_length": "Accept length",
    "simulated_acceptance": "SIMULATED acceptance",
}
_DETAILS = {  # lists in JSON, by the fields of an outcome
    "input_lens": "prompt_len",
    "output_lens": "output_len",
    "latencies": "latency_s",
    "ttfts": "ttft_s",
    "itls": "itl_s",
    "cached_tokens": "cached_tokens",
    "generated_texts": "text",
    "errors": "error",
}


@dataclass(frozen=True)
class ServingRun:
    """One run against a server, complete: the settings, the outcome of each request, and the figures."""

    config: dict[str, Any]  # settings by name, as they go into the JSON
    start_s: float  # on the event loop's clock, which Outcome.sent_s is on as well
    outcomes: list[Outcome]  # in the data set's order
    figures: dict[str, Any]  # numbers, or None: nothing to compute it from, or the server does not tell
    shares: dict[str, Any] | None = None  # shares of the machine; None: no --machine-limits

    def json(self, details: bool = False) -> dict[str, Any]:
        """Return the object that goes into a JSONL file; with `details` also lists with one entry per request."""
        found = self.config | self.figures | (self.shares or {})
        if details:
            found |= {name: [getattr(o, field) for o in self.outcomes] for name, field in _DETAILS.items()}
            found["start_times"] = [outcome.sent_s - self.start_s for outcome in self.outcomes]
        return found


def compute_figures(
    outcomes: Sequence[Outcome], start_s: float, duration_s: float, count_tokens: Callable[[str], int] | None = None
) -> dict[str, Any]:
    """Compute figures of the requests that succeeded. `count_tokens` gives the tokens of a text, for the retokenized total.

    Throughputs are per second of the run's duration; the greatest is the most tokens within one second, counted from the
    start. Concurrency is the sum of the latencies / duration. Cached is a share of all prompt tokens, 0 to 1. TPOT is a
    request's (latency - TTFT) / (output tokens - 1); ITL is over all gaps of all requests. Latencies are mean_ttft_ms and
    so on, for all of LATENCIES; percentiles interpolate linearly, as numpy's do.
    """
    good = [outcome for outcome in outcomes if outcome.ok]
    streamed = [(o, o.ttft_s) for o in good if o.ttft_s is not None]
    inputs, outputs = sum(o.prompt_len for o in good), sum(o.output_len for o in good)
    cached = [o.cached_tokens for o in good if o.cached_tokens is not None]
    prompts = sum(o.prompt_tokens or o.prompt_len for o in good if o.cached_tokens is not None)
    latencies_s = {
        "e2e_latency": [o.latency_s for o in good],
        "ttft": [ttft for _, ttft in streamed],
        "tpot": [(o.latency_s - ttft) / (o.output_len - 1) for o, ttft in streamed if o.output_len > 1],
        "itl": [gap for o in good for gap in o.itl_s],
    }
    return {
        "completed": len(good),
        "duration": duration_s,
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": None if count_tokens is None else sum(count_tokens(o.text) for o in good),
        "total_cached_tokens": sum(cached) if cached else None,
        "cache_hit_rate": sum(cached) / max(prompts, 1) if cached else None,
        "max_output_tokens_per_s": _peak(streamed, start_s),
        **throughputs(len(good), inputs, outputs, duration_s),
        "concurrency": sum(o.latency_s for o in good) / duration_s if duration_s else 0.0,
    } | {
        f"{statistic}_{name}_ms": _milliseconds(latencies_s[name], statistic)
        for name, (_, _, statistics) in LATENCIES.items()
        for statistic in statistics
    }


def throughputs(requests: int, inputs: int, outputs: int, duration_s: float) -> dict[str, float]:
    """Return requests and tokens per second."""
    amounts = {"request": requests, "input": inputs, "output": outputs, "total": inputs + outputs}
    return {f"{name}_throughput": amount / duration_s if duration_s else 0.0 for name, amount in amounts.items()}


def _milliseconds(seconds: Sequence[float], statistic: str) -> float | None:
    if not seconds:
        return None
    return 1e3 * float(np.mean(seconds) if statistic == "mean" else np.percentile(seconds, _PERCENTS[statistic]))


def _peak(streamed: Sequence[tuple[Outcome, float]], start_s: float) -> float | None:
    """Return the most tokens in one second of the run. Where a server sends several tokens at once without saying how many,
    all parts of an answer count alike."""
    seconds: dict[int, float] = defaultdict(float)
    for outcome, ttft in streamed:
        for time in outcome.sent_s - start_s + np.cumsum([ttft, *outcome.itl_s]):
            seconds[int(time)] += outcome.output_len / (1 + len(outcome.itl_s))
    return max(seconds.values(), default=None)


def compute_shares(outcomes: Sequence[Outcome], figures: Mapping[str, Any], roofline: Roofline) -> dict[str, Any]:
    """Compute how near the run came to the machine's limits.

    Rows are requests past their first token, the mean over the time when there is any; the context of one is its prompt
    and half of its output, the mean; a step takes the mean ITL. Computed are uncached prompt tokens and output tokens.
    """
    streamed = [o for o in outcomes if o.ok and o.ttft_s is not None]
    context = float(np.mean([o.prompt_len + o.output_len / 2 for o in streamed])) if streamed else None
    step_s = (figures["mean_itl_ms"] or 0.0) / 1e3
    computed = figures["total_input_tokens"] - (figures["total_cached_tokens"] or 0) + figures["total_output_tokens"]
    spans = [(o.sent_s + (o.ttft_s or 0.0), o.sent_s + o.latency_s) for o in streamed]
    busy = covered(spans)
    rows = sum(end - start for start, end in spans) / busy if busy else None
    return roofline.shares(rows, context, step_s, computed, figures["duration"])


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time in which at least one of the intervals runs, from their starts and ends."""
    found, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        found += max(end - max(start, until), 0.0)
        until = max(until, end)
    return found


def labelled(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that a block shows by their labels, in its order."""
    return {label: found[name] for name, label in _LABELS.items() if name in found}


def standard_block(run: ServingRun) -> str:
    """Format the block that other tools print and compare."""
    found = dict(run.figures)
    if found["cache_hit_rate"] is None:  # the server does not tell
        del found["total_cached_tokens"], found["cache_hit_rate"]
    else:
        found["cache_hit_rate"] = f"{found['cache_hit_rate']:.2%}"
    for name in ("accept_length", "simulated_acceptance"):
        if found[name] is None:
            del found[name]
    rows = {
        "Backend": run.config["backend"],
        "Traffic request rate": str(run.config["request_rate"]),
        "Max request concurrency": run.config["max_concurrency"] or "not set",
        **labelled(found),
    }
    for name, (title, label, statistics) in LATENCIES.items():
        rows[title] = title
        rows |= {f"{each.capitalize()} {label} (ms)": found[f"{each}_{name}_ms"] for each in statistics}
    return block("Serving Benchmark Result", rows)


def failure_line(run: ServingRun) -> str | None:
    """Say how many requests failed, and why the first of them did."""
    errors = [outcome.error for outcome in run.outcomes if not outcome.ok]
    return f"{len(errors)} of {len(run.outcomes)} requests failed, the first with: {errors[0]}" if errors else None


def filled(template: str, record: Mapping[str, Any]) -> str | None:
    """Fill a template of str.format with a record's fields, its machine limits' included. None where a field is missing or None."""
    values = record | record.get("machine_limits", {})
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    return None if any(values.get(name) is None for name in names) else template.format_map(values)


def report(lines: Sequence[str], record: Mapping[str, Any]) -> str:
    """Fill the templates of a batch's lines with its record; a line with an unknown figure is left out."""
    return "".join(f"{text}\n" for line in lines if (text := filled(line, record)) is not None)


def markdown_table(columns: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    """Format a row per record; `columns` has each title's template. An unknown figure is a dash, a column of dashes is left out."""
    found = {title: [filled(template, record) for record in records] for title, template in columns.items()}
    found = {title: cells for title, cells in found.items() if any(cells)}
    head, *rows = (
        f"| {' | '.join(cell or '–' for cell in row)} |" for row in [list(found), *zip(*found.values(), strict=True)]
    )
    return "\n".join([head, "|" + "---:|" * len(found), *rows])
