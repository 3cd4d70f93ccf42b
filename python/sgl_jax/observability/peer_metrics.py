"""Names under which other engines publish metrics that mean the same as ours, for gateways and dashboards that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prometheus_client.core import Metric

type Peer = Literal["vllm", "sglang"]

# Their name, without the engine's, and ours, without "sgl_jax_".
_BOTH = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
}
NAMES: Mapping[Peer, Mapping[str, str]] = {
    "vllm": _BOTH
    | {
        "num_requests_running": "num_requests_running",
        "num_requests_waiting": "num_requests_waiting",
        "kv_cache_usage_perc": "kv_usage_ratio",
        "gpu_cache_usage_perc": "kv_usage_ratio",  # the older name
        "prefix_cache_queries": "prompt_tokens",
        "prefix_cache_hits": "prefix_cache_hit_tokens",
        "num_preemptions": "preemptions",
        "request_success": "requests_finished",
        "spec_decode_num_drafts": "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens": "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens": "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos": "spec_decode_num_accepted_tokens_per_pos",
    },
    "sglang": _BOTH
    | {
        "num_running_reqs": "num_requests_running",
        "num_queue_reqs": "num_requests_waiting",
        "token_usage": "kv_usage_ratio",
        "gen_throughput": "generation_throughput",
        "cached_tokens": "prefix_cache_hit_tokens",
        "num_retracted_requests": "preemptions",
        "spec_accept_length": "spec_accept_length",
        "spec_accept_rate": "spec_accept_rate",
    },
}
_LABELS = {"reason": "finished_reason"}


def renamed(metrics: Sequence[Metric], peer: Peer, model_name: str) -> Iterator[Metric]:
    """Yield those of our metrics that the peer has, under its names and with the labels that it gives each."""
    from prometheus_client.core import GaugeMetricFamily, Metric

    ours = {each.name: each for each in metrics}
    labels = {"model_name": model_name} | ({"engine": "0"} if peer == "vllm" else {})
    for theirs, name in NAMES[peer].items():
        if (metric := ours.get(f"sgl_jax_{name}")) is None:  # drafts, where none are made
            continue
        found = Metric(f"{peer}:{theirs}", metric.documentation, metric.type)
        for sample in metric.samples:
            own = {_LABELS.get(label, label): value for label, value in sample.labels.items()}
            found.add_sample(found.name + sample.name.removeprefix(metric.name), labels | own, sample.value)
        yield found
    if peer == "sglang":
        hits, asked = (
            ours[f"sgl_jax_{name}"].samples[0].value for name in ("prefix_cache_hit_tokens", "prompt_tokens")
        )
        text = "Share of the prompt tokens that were in the prefix cache, since the start"
        rate = GaugeMetricFamily("sglang:cache_hit_rate", text, labels=[*labels])
        rate.add_metric([*labels.values()], hits / asked if asked else 0.0)
        yield rate
