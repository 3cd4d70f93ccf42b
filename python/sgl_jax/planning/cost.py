"""Least cost of a step on each device, in operations and in bytes from memory and between chips; and its least time.

A decode step has a row for each W tokens, with `context` tokens in the cache. A prompt step has whole prompts of `context`
tokens, or the end of one if it is longer than the step. Only the unavoidable is counted: each weight is read once for each part
of the step, and each row's KV once; activations, sampling and drafting cost nothing. The least time is that of the slowest resource (the roofline model:
Williams, Waterman and Patterson, 2009).
"""

import dataclasses
import math

import jax
import numpy as np

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import declare, declare_plain, head
from sgl_jax.parallel.grid import Grid
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.pool import Pool


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of one device, and of the links to the others."""

    flops: float
    bytes_per_s: float
    all_reduce_bytes_per_s: float  # bytes of the summed array; infinite on one device
    all_reduce_s: float = 0.0  # latency of a sum


@dataclasses.dataclass(frozen=True)
class Bound:
    """Least time of each resource. They may work at the same time, so the longest is the least time of the step; a program that
    waits for every sum takes at least `in_turn_s`."""

    compute_s: float
    memory_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def in_turn_s(self) -> float:
        return max(self.compute_s, self.memory_s) + self.links_s

    @property
    def limit(self) -> str:
        times = {"compute": self.compute_s, "memory": self.memory_s, "links": self.links_s}
        return max(times, key=times.__getitem__)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Costs of one device."""

    flops: float
    memory_bytes: float
    reduced_bytes: float  # size of the arrays that are summed over the devices
    num_sums: int = 0

    def bound(self, rates: Rates) -> Bound:
        links_s = self.reduced_bytes / rates.all_reduce_bytes_per_s + self.num_sums * rates.all_reduce_s
        return Bound(self.flops / rates.flops, self.memory_bytes / rates.bytes_per_s, links_s)


def step_cost(
    model: DecoderConfig, grid: Grid, pool: Pool, bucket: Bucket, context: int, *, weight_dtype: str, compute_dtype: str
) -> StepCost:
    """Count a step of a full bucket on every data rank, for one of the grid's devices, each of which has such a pool.

    A product takes two operations for each of its multiplications, and attention two products per key.
    """
    shard = model.shard(grid)
    plain, held = declare_plain(shard, weight_dtype), declare(shard, weight_dtype)
    tokens, parts, moe = bucket.num_tokens, bucket.num_parts, model.moe
    of_all_ranks = tokens * grid.data
    chosen = moe.experts_per_token / moe.num_experts if moe else 0.0

    def used(spec: WeightSpec) -> float:
        """Return a matrix's values times the tokens that each is multiplied with."""
        if not spec.is_matrix:
            return 0.0
        of_tokens = of_all_ranks if "ffn" in spec.axes else tokens
        return math.prod(spec.shape) * (chosen * of_all_ranks if spec.axes[0] == "experts" else of_tokens)

    def read(spec: WeightSpec) -> float:
        """Return the bytes read, for each part of the step: of experts those that some token of it chose, if all are equally
        likely to be chosen."""
        return parts * spec.nbytes * (1 - (1 - chosen) ** (of_all_ranks / parts) if spec.axes[0] == "experts" else 1)

    head_size = math.prod(plain.embed.shape)
    keys, cached = 0.0, 0.0  # query-key pairs, and tokens whose KV is read, summed over layers
    for layer in range(model.num_layers):
        per_query, of_layer = _visible(bucket, context, model.window(layer) or context)
        keys += tokens * per_query
        cached += of_layer
    token_kv = pool.bytes_per_token / pool.num_layers
    # Each layer sums the outputs of attention and MLP over the devices, and the embedding sums its shards' rows. For the
    # tokens of all ranks, the gather before the MLP and the reduce-scatter behind it cost one all-reduce together.
    # With sequence parallelism, as in parts, data ranks leave one sum within a rank.
    layers, divides = model.num_layers, grid.sequence or parts > 1
    within = (layers if divides and grid.data > 1 else 2 * layers) + 1 if grid.tensor > 1 else 0
    across = layers + 1 if grid.data > 1 else 0
    per_key = 2 * shard.num_heads * (shard.key_dim + shard.value_dim)
    return StepCost(
        flops=2 * sum(map(used, jax.tree.leaves(plain.layers)))
        + 2 * head_size * bucket.num_rows * bucket.width * grid.data
        + per_key * keys,
        memory_bytes=sum(map(read, jax.tree.leaves(held.layers)))
        + sum(spec.nbytes for spec in jax.tree.leaves(head(held)))
        + tokens * model.hidden_size * np.dtype(weight_dtype).itemsize  # lines of the embedding
        + token_kv * (cached + tokens * model.num_layers),  # read, and written
        reduced_bytes=(within * tokens + across * of_all_ranks) * model.hidden_size * np.dtype(compute_dtype).itemsize,
        num_sums=parts * (within + across),
    )


def _visible(bucket: Bucket, context: int, window: int) -> tuple[float, float]:
    """Return, for one layer, the keys a query sees on average and the tokens whose KV is read."""
    tokens = bucket.num_tokens
    if bucket.decodes:
        return min(context, window), bucket.num_rows * min(context, window)
    if tokens <= context:  # the last part of one prompt
        first = context - tokens
        return _mean_keys(first, context, window), min(context, tokens + window - 1)
    return _mean_keys(0, context, window), tokens


def _mean_keys(first: int, end: int, window: int) -> float:
    """Return the mean of min(position + 1, window) over the queries at positions [first, end)."""
    grown = max(first, min(end, window))  # queries from here on see a whole window
    return ((first + 1 + grown) / 2 * (grown - first) + window * (end - grown)) / (end - first)
