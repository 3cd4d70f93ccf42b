"""Draw a file of results: what bench_serving or sweep.py wrote, as pictures beside it.

    python benchmarks/plot.py results.jsonl

Lines of one input and output length become isl…_osl….png: throughput against median latencies, a point per concurrency.
Each line that was written with --output-details becomes run….png as well: the run over its time.
Needs matplotlib: pip install "sgl-jax[bench]".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

type Result = Mapping[str, Any]

BINS = 40
TIME = "time since the start of the run (s)"
SPELT = {"TPOT": "time per output token", "TTFT": "time to first token"}


def counted(results: Sequence[Result]) -> str:
    """Return which tokens are shown: the prompts' where one is generated, as such a case measures prefill."""
    return "input" if results[0]["random_output_len"] == 1 else "output"


def curves(results: Sequence[Result]) -> dict[str, list[tuple[int, float, float]]]:
    """Return the points by latency: (concurrency, median latency in ms, tokens/s), concurrency rising."""
    y, found = f"{counted(results)}_throughput", {}
    for latency in SPELT:
        x = f"median_{latency.lower()}_ms"
        if points := sorted((each["max_concurrency"], each[x], each[y]) for each in results if each[x] is not None):
            found[latency] = points
    return found


def draw_sweep(results: Sequence[Result]) -> Figure:
    """Draw throughput against median latencies. The results are of one ISL and OSL."""
    found, first = curves(results), results[0]
    figure = Figure(figsize=(6.0 * max(len(found), 1), 4.8), layout="constrained")
    sizes = f"ISL {first['random_input_len']}, OSL {first['random_output_len']}"
    figure.suptitle(f"{sizes}  ·  {first['model']}  ·  requests at a time: at the points")
    for place, (latency, points) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), place)
        axes.set(title=f"Throughput against {SPELT[latency]}", xlabel=f"median {latency} (ms)")
        axes.set_ylabel(f"{counted(results)} throughput (tokens/s)")
        concurrencies, xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "o-")
        for concurrency, x, y in zip(concurrencies, xs, ys, strict=True):
            axes.annotate(f"{concurrency}", (x, y), xytext=(-4, 5), textcoords="offset points", ha="right")
        axes.set(xlim=(0, 1.08 * max(xs)), ylim=(0, 1.12 * max(ys)))
    return figure


def draw_run(result: Result) -> Figure:
    """Draw one run over its time, from its lists per request: tokens per second, TTFT and ITL."""
    lists = zip(*(result[name] for name in ("start_times", "ttfts", "itls", "output_lens")), strict=True)
    streamed = [request for request in lists if request[1] is not None]
    came = [start + np.cumsum([ttft, *itls]) for start, ttft, itls, _ in streamed]
    # A server may send several tokens at once without saying how many: all parts of an answer then count alike.
    tokens = [np.full(len(times), request[3] / len(times)) for times, request in zip(came, streamed, strict=True)]
    nothing = np.zeros(0)
    edges = np.linspace(0, result["duration"], BINS + 1)
    rate = np.histogram(np.concatenate([nothing, *came]), edges, weights=np.concatenate([nothing, *tokens]))[0]
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    figure.suptitle(f"{result['model']}  ·  {result['backend']}  ·  requests: {len(result['start_times'])}")
    throughput, ttft, itl = figure.subplots(1, 3)
    throughput.set(title="Output throughput", ylabel="tokens/s", xlabel=TIME)
    throughput.stairs(rate / np.diff(edges), edges, fill=True)
    ttft.set(title="Time to first token, by when the request was sent", ylabel="ms", xlabel=TIME)
    ttft.plot([request[0] for request in streamed], [1e3 * request[1] for request in streamed], ".")
    itl.set(title="Inter-token latency, by when the token came", ylabel="ms", xlabel=TIME)
    gaps = np.concatenate([nothing, *(request[2] for request in streamed)])
    itl.plot(np.concatenate([nothing, *(times[1:] for times in came)]), 1e3 * gaps, ".", markersize=2)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file of JSON lines")
    path = parser.parse_args(argv).results
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pictures = {f"run{number}": draw_run(each) for number, each in enumerate(results, 1) if "ttfts" in each}
    for sizes in dict.fromkeys((each["random_input_len"], each["random_output_len"]) for each in results):
        same = [each for each in results if (each["random_input_len"], each["random_output_len"]) == sizes]
        by_concurrency = {each["max_concurrency"]: each for each in same if each["max_concurrency"]}  # the last counts
        if by_concurrency:
            pictures["isl{}_osl{}".format(*sizes)] = draw_sweep(list(by_concurrency.values()))
    for name, figure in pictures.items():
        figure.savefig(path.with_name(f"{name}.png"), dpi=120)
        print(path.with_name(f"{name}.png"))


if __name__ == "__main__":
    main()
