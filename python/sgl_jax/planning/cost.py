"""What a step costs each device at least: operations, bytes from memory, bytes between chips; and so its least time.

A decode step has a row per token, each with `context` tokens in the cache. A prompt step has whole prompts of `context`
tokens, or the end of one if it is longer than the step. Counted is what must be: each weight read once, each row's KV read
once, activations and sampling for nothing.
"""

from __future__ import annotations

import dataclasses

import jax

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.weights import declare, head
from sgl_jax.runtime.buckets import Bucket


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one device, and of what links it to the others."""

    flops: float
    bytes_per_s: float
    all_reduce_bytes_per_s: float  # of the summed array; infinite on one device


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Of one device."""

    flops: float
    memory_bytes: float
    reduced_bytes: float  # of arrays summed over the devices

    def bound(self, rates: Rates) -> Bound:
        return Bound(
            compute_s=self.flops / rates.flops,
            memory_s=self.memory_bytes / rates.bytes_per_s,
            links_s=self.reduced_bytes / rates.all_reduce_bytes_per_s,
        )


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time each resource needs; they may work side by side, so the longest is the least time of the step."""

    compute_s: float
    memory_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def limit(self) -> str:
        times = {"compute": self.compute_s, "memory": self.memory_s, "links": self.links_s}
        return max(times, key=times.__getitem__)


def step_cost(model: DecoderConfig, devices: int, itemsize: int, bucket: Bucket, context: int) -> StepCost:
    """A full step of the bucket, on one of `devices` tensor-parallel devices."""
    share = model.share(devices)
    declared = declare(share)
    layers = sum(_size(spec) for spec in jax.tree.leaves(declared.layers))
    matrices = sum(_size(spec) for spec in jax.tree.leaves(declared.layers) if spec.is_matrix and not spec.num_experts)
    head_size = _size(head(declared))
    decoding = bucket.num_tokens <= bucket.num_rows
    keys, cached = 0, 0  # keys that queries look at, tokens whose KV is read; over all layers
    for layer in range(model.num_layers):
        window = model.window(layer) or context
        per_query, read = _visible(bucket, context, window, decoding)
        keys += bucket.num_tokens * per_query
        cached += read
    token_kv = 2 * share.num_kv_heads * share.head_dim  # of one layer
    return StepCost(
        flops=2 * matrices * bucket.num_tokens
        + 2 * head_size * bucket.num_rows
        + 4 * share.num_heads * share.head_dim * keys,
        memory_bytes=itemsize
        * (
            layers
            + head_size
            + bucket.num_tokens * model.hidden_size  # of the embedding
            + token_kv * (cached + bucket.num_tokens * model.num_layers)  # read, and written
        ),
        # Each layer sums the attention's and the MLP's output, and the embedding is looked up in shares.
        reduced_bytes=(2 * model.num_layers + 1) * bucket.num_tokens * model.hidden_size * itemsize
        if devices > 1
        else 0,
    )


def _visible(bucket: Bucket, context: int, window: int, decoding: bool) -> tuple[float, float]:
    """In one layer: keys a query sees on average, and tokens whose KV is read."""
    tokens = bucket.num_tokens
    if decoding:
        return min(context, window), tokens * min(context, window)
    if tokens <= context:  # the last part of one prompt
        first = context - tokens
        return _mean_keys(first, context, window), min(context, tokens + window - 1)
    return _mean_keys(0, context, window), tokens


def _mean_keys(first: int, end: int, window: int) -> float:
    """Mean over the queries at positions [first, end) of min(position + 1, window)."""
    grown = max(first, min(end, window))  # from here on each sees a whole window
    return ((first + 1 + grown) / 2 * (grown - first) + window * (end - grown)) / (end - first)


def _size(spec) -> int:
    size = 1
    for n in spec.shape:
        size *= n
    return size
