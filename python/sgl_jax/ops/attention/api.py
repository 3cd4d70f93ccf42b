"""The attention contract. One call serves any mix of prompt chunks and decoding rows.

The pool is one array for all layers, `kv[L * P, K, 2, page, H]`, K at index 0 and V at index 1 of axis 2; page p of layer i
is `kv[i * P + p]`. Page 0 of each layer takes the KV of padding tokens and is never read.

A latent pool has one plane in place of K and V, `kv[L * P, K, 1, page, H]`: the values are the first value_dim columns of
the keys, and v is None.

q, k and v come fused from one product, `[T, N + 2K, H]`. A backend with `Backend.fused` gets them so, as q, with k and v
None; for others split_heads cuts them apart first.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from sgl_jax.ops.norm_rope import rms_norm, rotate

Queries = Float[Array, "T heads H"]  # N heads, or N + 2K fused ones
NewKV = Float[Array, "T K H"]
Output = Float[Array, "T N V"]
Pool = Num[Array, "LP K planes page HP"]  # HP: H, or more where the backend pads heads
AnyPool = Num[Array, "LP ..."]  # in any order (backends.PoolOrder)
Column = Int[Array, " S"]
Scalar = Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """Says which packed tokens belong to which row, and where their KV lives.

    Row s owns tokens [cu_q_lens[s], cu_q_lens[s+1]), the last ones of its kv_lens[s] tokens. Short rows come first:
    num_short of them, each with at least one new token and at most W (AttentionSpec.width), and S * W <= T. Rows past the
    last real one are empty; tokens past cu_q_lens[-1] are padding.
    """

    page_table: jax.Array  # i32[S, pages]: a page id of layer 0 for each page_size tokens
    kv_lens: jax.Array  # i32[S]: tokens in the cache, this step's included
    cu_q_lens: jax.Array  # i32[S + 1]
    num_short: jax.Array  # i32[]
    token_row: jax.Array  # i32[T]: the row of each token
    positions: jax.Array  # i32[T]: its position in the row's sequence
    token_page: jax.Array  # i32[T]: the layer-0 page its KV goes to; 0 for padding
    token_offset: jax.Array  # i32[T]: and its offset in that page
    # i32[S]: the last tokens of each row that stand for none (drafts that it lacks); a backend may leave them out. None: none do.
    num_missing: jax.Array | None = None
    has_short: bool = dataclasses.field(default=True, metadata={"static": True})  # False: num_short is 0 in every step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QKPrepare:
    """RMS norm of each head of q and k, then their rotation; either may be missing."""

    q_norm: jax.Array | None  # [H]: the factors of the normed q
    k_norm: jax.Array | None  # [H]; both norms or neither
    rope: jax.Array | None  # f32[T, 2 * half]: cos then sin of each token's angles; i is rotated with half + i
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})

    def __call__(self, q: Float[Array, "T N H"], k: Float[Array, "T K H"]):
        """Prepare q and k in plain operations, in their own dtype, rounded after the norm and after the rotation."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        return (q, k) if self.rope is None else (rotate(q, self.rope), rotate(k, self.rope))


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of attention: one for all layers of a program."""

    scale: float
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    temperature_length: int | None = None  # logn scaling: capped scores times max(1, log(position) / log(this))
    value_dim: int | None = None  # V of a latent pool; None: the pool has planes for K and V
    width: int = 1  # W: the most new tokens a short row may have (RaggedBatch)
    # Keys at lower positions are not seen. A query that sees no key gives zeros if there are sinks, else any finite numbers.
    first_key: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer: the program's spec, and the arrays that differ by layer."""

    spec: AttentionSpec = dataclasses.field(metadata={"static": True})
    first_page: jax.Array | int  # i32[]: layer * P
    window: jax.Array | int | None = None  # i32[]: keys a query sees, its own included
    sinks: jax.Array | None = None  # [N]: a logit per head that takes weight and gives nothing
    kv_scales: jax.Array | None = None  # f32[2]: the pool holds K / [0] and V / [1]; a latent pool divides by [0]
    prepare: QKPrepare | None = None  # done to q and k first; the pool holds prepared k

    @property
    def scales(self) -> tuple[jax.Array | float, jax.Array | float]:
        """Return the factors that bring K and V of the pool back to their values; 1.0 without kv_scales."""
        if self.kv_scales is None:
            return 1.0, 1.0
        return self.kv_scales[0], self.kv_scales[0 if self.spec.value_dim is not None else 1]


@runtime_checkable  # so that tests can check annotations
class Attention(Protocol):
    """Write the new KV, attend, return the output and the pool (same buffer when donated)."""

    def __call__(
        self, q: Queries, k: NewKV | None, v: NewKV | None, kv: AnyPool, batch: RaggedBatch, layer: AttentionLayer
    ) -> tuple[Output, AnyPool]: ...


def make_ragged_batch(
    page_table: Int[Array, "S pages"],
    start: Column,
    num_new: Column,
    num_short: Scalar,
    num_tokens: int,
    page_size: int,
    num_missing: Column | None = None,
) -> RaggedBatch:
    """Derive the batch of `num_tokens` packed tokens (static, padding included) from the plan's columns.

    Rows lie in the order of the columns, those of at most W new tokens first: `num_short` of them.
    """
    num_rows = len(start)
    cu = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_new, dtype=jnp.int32)])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(cu[1:], token, side="right", method="compare_all"), num_rows - 1)
    row = row.astype(jnp.int32)
    valid = token < cu[-1]
    positions = jnp.where(valid, start[row] + token - cu[row], 0)
    token_page = jnp.where(valid, page_table[row, positions // page_size], 0)
    offset = positions % page_size
    return RaggedBatch(page_table, start + num_new, cu, num_short, row, positions, token_page, offset, num_missing)


def batch_part(batch: RaggedBatch, number: int, num_parts: int) -> RaggedBatch:
    """Return the batch of one of equal parts of the packed tokens, to be computed after the parts before it.
    Tokens that rows lack are computed there.

    Rows without tokens in the part are empty and come last. Short rows must all lie in part 0.
    """
    size = len(batch.token_row) // num_parts
    first, end = number * size, (number + 1) * size
    begins, ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    skipped = (ends <= first).sum(dtype=jnp.int32)
    order = (jnp.arange(len(ends), dtype=jnp.int32) + skipped) % len(ends)
    num_new = (jnp.clip(ends, first, end) - jnp.clip(begins, first, end))[order]
    num_later = jnp.maximum(ends - jnp.maximum(begins, end), 0)
    return RaggedBatch(
        page_table=batch.page_table[order],
        kv_lens=jnp.where(num_new > 0, (batch.kv_lens - num_later)[order], 0),
        cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_new, dtype=jnp.int32)]),
        num_short=batch.num_short if number == 0 else jnp.int32(0),
        token_row=jnp.maximum(batch.token_row[first:end] - skipped, 0),
        positions=batch.positions[first:end],
        token_page=batch.token_page[first:end],
        token_offset=batch.token_offset[first:end],
        has_short=number == 0,
    )


def split_heads(qkv: Float[Array, "T heads H"], num_kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cut fused q, k and v apart: q [T, N, H], k and v [T, K, H]."""
    num_tokens, num_heads, head_dim = qkv.shape
    ends = (num_heads - 2 * num_kv_heads) * head_dim, (num_heads - num_kv_heads) * head_dim
    q, k, v = jnp.split(qkv.reshape(num_tokens, -1), ends, axis=-1)  # in the product's own layout
    q, k, v = (x.reshape(num_tokens, -1, head_dim) for x in (q, k, v))
    return q, k, v


def to_pool(x: Float[Array, "T K H"], dtype: DTypeLike, scale: Float[Array, ""] | float) -> Num[Array, "T K H"]:
    """Divide new K or V by its scale and round it to the pool's dtype; 8-bit types saturate."""
    if jnp.dtype(dtype).itemsize > 1 and isinstance(scale, float) and scale == 1:
        return x.astype(dtype)
    x = x.astype(jnp.float32) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        x, limit = jnp.round(x), float(jnp.iinfo(dtype).max)  # symmetric: -128 is not used
    else:
        limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)


def write_kv(kv: Pool, k: NewKV, v: NewKV | None, batch: RaggedBatch, layer: AttentionLayer) -> Pool:
    """Write each token's K and V to its page and offset in the pool."""
    _pages, num_kv_heads, planes, page_size, head_dim = kv.shape
    both = zip([k] if v is None else [k, v], layer.scales, strict=False)
    new = jnp.stack([to_pool(x, kv.dtype, scale) for x, scale in both], axis=2)
    new = new.reshape(-1, head_dim)  # [T * K * planes, H]
    # The unit of writing is a line of H: with a larger one XLA for TPU wants the pool in another layout, and copies all
    # of it there and back in every layer.
    per_page = num_kv_heads * planes
    slots = (batch.token_page + layer.first_page)[:, None] * per_page + jnp.arange(per_page)
    lines = slots * page_size + batch.token_offset[:, None]  # [T, K * planes]
    return kv.reshape(-1, head_dim).at[lines.reshape(-1)].set(new).reshape(kv.shape)
