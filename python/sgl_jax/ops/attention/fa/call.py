"""The `fa` backend: shapes and layouts around the two kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from sgl_jax.ops.attention.api import AttentionLayer, RaggedBatch, split_heads, to_pool
from sgl_jax.ops.attention.fa import blocks as block_sizes
from sgl_jax.ops.attention.fa.blocks import ChunkBlocks, DecodeBlocks
from sgl_jax.ops.attention.fa.chunks import attend_chunks
from sgl_jax.ops.attention.fa.decode import attend_singles
from sgl_jax.ops.attention.fa.prepare import operands
from sgl_jax.ops.attention.fa.ring import IDS
from sgl_jax.ops.attention.fa.tile import LANES, Scalars, Scores, row_tile

TOKENS = 16  # packed tokens come in multiples of this: the rows of a bfloat16 tile


def pool_head_dim(head_dim: int) -> int:
    """The head dim of a pool for this backend: whole lane tiles, which is what the chip's memory would take anyway."""
    return -(-head_dim // LANES) * LANES


def page_size_multiple(dtype: Any) -> int:
    """Page sizes must be multiples of this."""
    return row_tile(dtype)


def paged_attention(
    q: Float[Array, "T heads H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    kv: Num[Array, "LP K planes page HP"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    blocks: tuple[DecodeBlocks, ChunkBlocks] | None = None,
) -> tuple[Float[Array, "T N V"], Num[Array, "LP K planes page HP"]]:
    """See api.Attention. The pool's head dim HP is pool_head_dim(H), its page size a multiple of page_size_multiple.

    `blocks`: sizes other than the chip's (for tests).
    """
    num_tokens, head_dim = q.shape[0], q.shape[2]
    _, num_kv_heads, _, _, pool_dim = kv.shape
    if k is None and (head_dim != pool_dim or kv.dtype.itemsize == 1 or layer.kv_scales is not None):
        q, k, v = split_heads(q, num_kv_heads)  # heads are to be padded, or k and v made what the pool holds
    joined = k is None
    num_heads = q.shape[1] - 2 * num_kv_heads if joined else q.shape[1]
    if pool_dim != pool_head_dim(head_dim):
        raise ValueError(
            f"attention backend fa needs a pool of head dim {pool_head_dim(head_dim)} for heads of {head_dim}, "
            f"this one has {pool_dim}"
        )
    if kv.shape[3] % page_size_multiple(kv.dtype):
        raise ValueError(
            f"attention backend fa needs pages of a multiple of {page_size_multiple(kv.dtype)} {kv.dtype} tokens; "
            f"--page-size is {kv.shape[3]}"
        )
    num_rows, row_pages = batch.page_table.shape
    padded_tokens = -(-num_tokens // TOKENS) * TOKENS
    if blocks is None:
        chip = block_sizes.current_chip()
        blocks = (
            block_sizes.decode_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads),
            block_sizes.chunk_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads, padded_tokens),
        )
    padded_tokens = -(-num_tokens // blocks[1].queries) * blocks[1].queries

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, padded_tokens - num_tokens), (0, 0), (0, pool_dim - head_dim))).astype(dtype)

    def flat(x: jax.Array) -> jax.Array:
        return padded(x).reshape(padded_tokens, -1)

    # 8-bit pools: values go in as bfloat16 that the pool's type holds exactly.
    dtype = jnp.dtype(kv.dtype) if kv.dtype.itemsize > 1 else jnp.dtype(jnp.bfloat16)
    spec, window, sinks, prepare = layer.spec, layer.window, layer.sinks, layer.prepare
    if prepare is not None and k is not None and (kv.dtype.itemsize == 1 or layer.kv_scales is not None):
        (q, k), prepare = prepare(q, k), None  # before they are divided and rounded
    heads_first = v is None and not joined
    k, v = (None if x is None else to_pool(x, kv.dtype, scale) for x, scale in zip((k, v), layer.scales, strict=True))
    value_dim = head_dim if spec.value_dim is None else spec.value_dim
    value_lanes = pool_head_dim(value_dim)
    table = jnp.pad(batch.page_table, ((0, 0), (0, -row_pages % IDS)))
    numbers = batch.num_short, layer.first_page, 0 if window is None else window
    scalars = Scalars(
        *(jnp.asarray(x, jnp.int32).reshape(1) for x in numbers),
        kv_scales=None if layer.kv_scales is None else jnp.stack(layer.scales).astype(jnp.float32),
    )
    if sinks is not None:
        lines = jnp.pad(sinks.astype(jnp.float32), (0, 8))[:, None]
        sinks = jnp.broadcast_to(lines, (num_heads + 8, LANES))
    prepared = operands(prepare, padded_tokens, head_dim, pool_dim, q.dtype)
    scores = Scores(spec.scale, spec.softcap, spec.temperature_length, dtype)
    num_lines = -(-min(num_rows, num_tokens) // TOKENS) * TOKENS
    # Queries are products of all heads at once, or of each head by itself (models/mla.py): the kernels take them as those
    # products lay them out.
    q2 = padded(q).swapaxes(0, 1) if heads_first else flat(q)
    k2, v2 = (None if x is None else flat(x) for x in (k, v))
    parts = []
    for first in range(0, num_lines, blocks[0].max_rows):  # more rows than VMEM holds are served in turn
        end = min(num_lines, first + blocks[0].max_rows)
        mine = scalars._replace(num_short=jnp.clip(scalars.num_short - first, 0, end - first))
        # Where all rows are served at once the kernel takes what it needs of the whole arrays.
        cut = (lambda x: x) if end - first == num_lines else (lambda x, first=first, end=end: x[first:end])
        rope = None if prepared.rope is None else cut(prepared.rope)
        part, kv = attend_singles(
            cut(q2.swapaxes(0, 1)).swapaxes(0, 1) if heads_first else cut(q2),
            None if k2 is None else cut(k2),
            None if v2 is None else cut(v2),
            kv,
            mine,
            cut(batch.kv_lens),
            cut(table).reshape(-1),
            sinks,
            prepared._replace(rope=rope),
            num_heads=num_heads,
            value_dim=value_lanes,
            num_rows=end - first,
            scores=scores,
            has_window=window is not None,
            blocks=blocks[0],
        )
        parts.append(part)
    out = parts[0]
    if len(parts) > 1:
        rest = [(0, 0)] * (out.ndim - 2) + [(0, padded_tokens - num_lines), (0, 0)]
        out = jnp.pad(jnp.concatenate(parts, axis=-2), rest)
    out, kv = attend_chunks(
        q2,
        k2,
        v2,
        out,
        kv,
        scalars,
        batch.kv_lens,
        batch.cu_q_lens,
        jnp.pad(batch.token_page, (0, padded_tokens - num_tokens)),
        table.reshape(-1),
        sinks,
        prepared,
        num_heads=num_heads,
        lines_set=num_lines,
        scores=scores,
        has_window=window is not None,
        blocks=blocks[1],
    )
    out = out.swapaxes(0, 1) if heads_first else out.reshape(padded_tokens, num_heads, value_lanes)
    out = out[:num_tokens, :, :value_dim]
    return out.astype(q.dtype), kv
