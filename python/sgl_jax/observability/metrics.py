"""Metrics for Prometheus: request times seen by the API process, and the engine's own gauges and counters."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from sgl_jax.observability.peer_metrics import Peer, renamed

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from sgl_jax.engine.messages import Stats

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)

# name, help, field of Stats
_GAUGES = (
    ("num_requests_running", "Requests with a row in the engine", "num_running"),
    ("num_requests_waiting", "Requests waiting to be admitted", "num_waiting"),
    ("kv_usage_ratio", "Share of the KV pool's pages that running requests hold", "kv_usage"),
    ("kv_cached_ratio", "Share of the KV pool's pages that hold cached prefixes nobody uses now", "cached_usage"),
    ("generation_throughput", "Generated tokens per second over the last log interval", "gen_throughput"),
    ("engine_resident_bytes", "Memory that the engine's process holds on the host", "resident_bytes"),
    ("programs_compiling", "Programs not compiled yet", "num_compiling"),
    ("lora_adapters_on_device", "LoRA adapters in slots of the device", "adapters_on_device"),
)
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens of admitted requests", "prompt_tokens"),
    ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache", "cached_tokens"),
    ("generation_tokens", "Generated tokens", "generated_tokens"),
    ("preemptions", "Requests that lost their pages and started over", "preemptions"),
    ("engine_steps", "Steps the engine ran", "steps"),
    ("engine_step_seconds", "Seconds that the engine's steps took", "step_seconds"),
    ("decode_steps", "Steps without prompt tokens", "decode_steps"),
    ("decode_step_seconds", "Seconds that steps without prompt tokens took", "decode_step_seconds"),
    ("compiles_after_ready", "Programs compiled while serving; without --skip-server-warmup 0", "compiles_after_ready"),
    ("lora_adapter_loads", "Times that an adapter was put into a slot of the device", "adapter_loads"),
    ("grammars_compiled", "Grammars compiled, with those that could not be", "grammars_compiled"),
    ("grammar_compile_seconds", "Seconds that threads compiled grammars", "grammar_compile_seconds"),
    ("grammar_masks", "Masks of grammars computed, one for each token of a request with one", "grammar_masks"),
    ("grammar_mask_seconds", "Seconds that the engine computed masks of grammars", "grammar_mask_seconds"),
)
# Metrics of a launch that speculates, with the names of SGLang and of vLLM.
_DRAFT_GAUGES = (
    ("spec_accept_length", "Tokens per step of a row with drafts, over the last log interval", "spec_accept_length"),
    ("spec_accept_rate", "Share of drafts that were accepted, over the last log interval", "spec_accept_rate"),
)
_DRAFT_COUNTERS = (
    ("spec_decode_num_drafts", "Times that a step verified drafts of a request", "draft_steps"),
    ("spec_decode_num_draft_tokens", "Drafts that were verified", "drafted_tokens"),
    ("spec_decode_num_accepted_tokens", "Drafts that were accepted", "accepted_drafts"),
)


class Histogram:
    """Counts of values per bucket. Observing is a bisection, since it runs once for each generated token."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        return list(zip((*map(str, self.bounds), "+Inf"), map(float, accumulate(self.counts)), strict=True))


class RequestMetrics:
    """Times of requests, from the arrival of their body to their tokens, in seconds."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_LATENCY)
        self.inter_token_latency = Histogram(_PER_TOKEN)
        self.request_latency = Histogram(_LATENCY)
        self.finished: Counter[str] = Counter()


@dataclasses.dataclass(frozen=True)
class ApiState:
    """Numbers that the API process has beside the times of requests."""

    num_adapters: int = 0
    paused: bool = False  # a trainer holds generation
    responses: Mapping[int, int] = dataclasses.field(default_factory=dict)  # by HTTP status


class _Collector:
    def __init__(
        self, requests: RequestMetrics, stats: Stats, about: Mapping[str, str], state: ApiState, peer: Peer | None
    ):
        self._requests, self._stats, self._about, self._state = requests, stats, about, state
        self._peer: Peer | None = peer

    def collect(self) -> Iterator[Metric]:
        ours = [*self._ours()]
        yield from ours
        if self._peer is not None:
            yield from renamed(ours, self._peer, self._about["model_name"])

    def _ours(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        build = GaugeMetricFamily("sgl_jax_build_info", "Always 1; what is served, and by what", labels=[*self._about])
        build.add_metric([*self._about.values()], 1)
        yield build
        yield GaugeMetricFamily("sgl_jax_lora_adapters", "Loaded LoRA adapters", value=self._state.num_adapters)
        yield GaugeMetricFamily("sgl_jax_generation_paused", "1 while a trainer holds it", value=self._state.paused)
        responses = CounterMetricFamily(
            "sgl_jax_http_responses", "Answers, without probes and pages", labels=["status"]
        )
        for status, number in sorted(self._state.responses.items()):
            responses.add_metric([str(status)], number)
        yield responses
        by_position = self._stats.accepted_per_position  # empty without speculation
        for name, text, field in (*_GAUGES, *(_DRAFT_GAUGES if by_position else ())):
            yield GaugeMetricFamily(f"sgl_jax_{name}", text, value=getattr(self._stats, field))
        for name, text, field in (*_COUNTERS, *(_DRAFT_COUNTERS if by_position else ())):
            yield CounterMetricFamily(f"sgl_jax_{name}", text, value=getattr(self._stats, field))
        if by_position:
            name, text = "sgl_jax_spec_decode_num_accepted_tokens_per_pos", "Accepted drafts by their place in a row"
            positions = CounterMetricFamily(name, text, labels=["position"])
            for position, accepted in enumerate(by_position):
                positions.add_metric([str(position)], accepted)
            yield positions
        finished = CounterMetricFamily("sgl_jax_requests_finished", "Finished requests", labels=["reason"])
        for reason in ("stop", "length", "abort"):
            finished.add_metric([reason], self._requests.finished[reason])
        yield finished
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", self._requests.time_to_first_token),
            ("inter_token_latency_seconds", "Between two tokens of a request", self._requests.inter_token_latency),
            ("e2e_request_latency_seconds", "Arrival to last token", self._requests.request_latency),
        ):
            yield HistogramMetricFamily(f"sgl_jax_{name}", text, histogram.cumulative(), histogram.sum)


def exposition(
    requests: RequestMetrics, stats: Stats, about: Mapping[str, str], state: ApiState, peer: Peer | None = None
) -> tuple[bytes, str]:
    """Return the text that Prometheus scrapes, and its content type. `about`: labels of the info metric. `peer`: an
    engine whose names the metrics have, too."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return generate_latest(_Collector(requests, stats, about, state, peer)), CONTENT_TYPE_LATEST
