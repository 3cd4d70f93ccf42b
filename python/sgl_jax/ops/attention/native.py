"""Paged attention in plain XLA: any platform, any head_dim, page size, window and soft cap.

A tile is a few consecutive queries of one row. Each tile walks its row's pages with online softmax, from the first page
its window reaches to its last key: the cost follows real lengths, not padding. Rows with one token are tiles of one;
longer ones are cut into tiles of TILE. On CPU tiles run one after another; elsewhere the tiles of one are vectorised.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from sgl_jax.ops.attention.api import QKPrepare, RaggedBatch, write_kv

TILE = 32
KEYS_PER_TURN = 128  # keys a tile of TILE looks at per turn of its loop
_FLOOR = -1e30  # finite: a row with no key in sight yet must not produce inf - inf


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    kv: Num[Array, "LP K planes page H"],
    batch: RaggedBatch,
    *,
    first_page: Int[Array, ""] | int,
    scale: float,
    window: Int[Array, ""] | int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    temperature_length: int | None = None,
    kv_scales: tuple[float, float] | None = None,
    prepare: QKPrepare | None = None,
    value_dim: int | None = None,
    vectorise: bool = False,
) -> tuple[Float[Array, "T N V"], Num[Array, "LP K planes page H"]]:
    """See api.Attention. `vectorise`: run the tiles of one side by side (accelerators) instead of in turn (CPU)."""
    if prepare is not None:
        q, k = prepare(q, k)
    num_tokens, num_heads, head_dim = q.shape
    value_dim = head_dim if value_dim is None else value_dim
    num_rows, num_kv_heads = batch.page_table.shape[0], k.shape[1]
    kv = write_kv(kv, k, v, batch, first_page, kv_scales)
    k_scale, v_scale = kv_scales or (1.0, 1.0)
    attend = functools.partial(
        _attend_tile,
        kv=kv,
        first_page=first_page,
        value_dim=value_dim,
        scale=scale * k_scale,
        v_scale=k_scale if v is None else v_scale,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.reshape(num_kv_heads, -1),
        temperature_length=temperature_length,
        upcast=not vectorise,  # on CPU small products are faster in float32 (benchmarks/LOG.md)
    )
    tiled = q.reshape(num_tokens, num_kv_heads, -1, head_dim)

    def single(row: jax.Array, pages_per_turn: int) -> jax.Array:
        kv_len = jnp.where(row < batch.num_short, batch.kv_lens[row], 0)
        query = lax.dynamic_slice_in_dim(tiled, row, 1)
        return attend(query, batch.page_table[row], kv_len - 1, kv_len, pages_per_turn=pages_per_turn)[0]

    out = jnp.zeros((num_tokens + TILE, *tiled.shape[1:3], value_dim), q.dtype)
    if vectorise:
        rows = jnp.arange(min(num_rows, num_tokens))
        ones = jax.vmap(functools.partial(single, pages_per_turn=_pages_per_turn(kv)))(rows)
        out = lax.dynamic_update_slice_in_dim(out, ones.astype(q.dtype), 0, 0)
    else:
        out = lax.fori_loop(0, batch.num_short, lambda row, out: out.at[row].set(single(row, 1).astype(q.dtype)), out)
    if num_tokens > 1:
        out = _attend_chunks(attend, tiled, out, batch, _pages_per_turn(kv))
    return out[:num_tokens].reshape(num_tokens, num_heads, value_dim), kv


def _pages_per_turn(kv: jax.Array) -> int:
    return max(1, KEYS_PER_TURN // kv.shape[3])


def _attend_chunks(attend, tiled, out, batch: RaggedBatch, pages_per_turn: int) -> jax.Array:
    """The rows with more than one token, tile by tile. A tile's surplus queries write garbage that later tiles, which
    come in token order, overwrite, or that lies in padding."""
    num_new = jnp.diff(batch.cu_q_lens)
    rows = jnp.arange(len(num_new))
    num_tiles = jnp.where(rows < batch.num_short, 0, -(-num_new // TILE))
    cu_tiles = jnp.cumsum(num_tiles)
    padded = jnp.pad(tiled, ((0, TILE), (0, 0), (0, 0), (0, 0)))

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(cu_tiles, i, side="right", method="compare_all")
        done = (i - cu_tiles[row] + num_tiles[row]) * TILE  # tokens of the row in earlier tiles
        first = batch.cu_q_lens[row] + done
        position = batch.kv_lens[row] - num_new[row] + done
        query = lax.dynamic_slice_in_dim(padded, first, TILE)
        end = jnp.minimum(batch.kv_lens[row], position + TILE)
        tile = attend(query, batch.page_table[row], position, end, pages_per_turn=pages_per_turn)
        return lax.dynamic_update_slice_in_dim(out, tile.astype(out.dtype), first, 0)

    return lax.fori_loop(0, cu_tiles[-1], one_tile, out)


def _attend_tile(
    q: Float[Array, "B K G H"],
    pages: Int[Array, " pages"],
    position: Int[Array, ""],
    kv_end: Int[Array, ""],
    *,
    kv: Num[Array, "LP K planes page H"],
    first_page: Int[Array, ""] | int,
    value_dim: int,
    scale: float,
    v_scale: float,
    window: Int[Array, ""] | int | None,
    softcap: float | None,
    sinks: Float[Array, "K G"] | None,
    temperature_length: int | None,
    pages_per_turn: int,
    upcast: bool,
) -> Float[Array, "B K G V"]:
    """Queries at position, position + 1, … over the keys before kv_end; float32 result."""
    num_queries, num_kv_heads, group, head_dim = q.shape
    page_size = kv.shape[3]
    # Where rows go side by side, what all of them read in a turn lies in memory at once: long pages take several turns.
    parts = 1 if upcast or page_size % KEYS_PER_TURN else page_size // KEYS_PER_TURN
    keys_per_turn = pages_per_turn * page_size // parts
    query_pos = position + jnp.arange(num_queries)[:, None]  # [B, 1]
    pages = jnp.pad(pages, (0, -len(pages) % pages_per_turn))
    first_turn = jnp.maximum(position - window + 1, 0) // keys_per_turn if window is not None else 0
    last_turn = (kv_end + keys_per_turn - 1) // keys_per_turn
    if upcast:
        q = q.astype(jnp.float32)
    grouped = q.transpose(1, 0, 2, 3).reshape(num_kv_heads, num_queries * group, head_dim)

    def load(turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        if pages_per_turn == 1 and upcast:
            block = lax.dynamic_index_in_dim(kv, pages[turn] + first_page, 0, keepdims=False)  # [K, planes, page, H]
            return block[:, 0], block[:, -1, :, :value_dim]
        ids = lax.dynamic_slice_in_dim(pages, turn // parts * pages_per_turn, pages_per_turn) + first_page
        # The pool seen head by head: of whole pages as long as heads are wide XLA TPU would copy all of the pool into
        # another layout, with K of all heads side by side.
        of_heads = kv.reshape(-1, page_size // parts, head_dim)
        planes = kv.shape[2]
        at = (ids * num_kv_heads + jnp.arange(num_kv_heads)[:, None]) * planes  # [K, pages]
        k, v = (of_heads[(at + plane) * parts + turn % parts] for plane in (0, planes - 1))
        shape = num_kv_heads, keys_per_turn, head_dim
        return k.reshape(shape), v.reshape(shape)[..., :value_dim]

    def body(turn: jax.Array, carry):
        top, total, acc = carry  # [K, B*G], [K, B*G], [K, B*G, V]
        k, v = load(turn)
        if upcast or kv.dtype.itemsize == 1:
            k, v = k.astype(grouped.dtype), v.astype(grouped.dtype)
        scores = jnp.einsum("kqh,kph->kqp", grouped, k, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if temperature_length is not None:
            log_position = jnp.log(jnp.maximum(query_pos, 1).astype(jnp.float32))
            growth = jnp.maximum(1.0, log_position / math.log(temperature_length))  # [B, 1]
            scores *= jnp.repeat(growth, group, axis=0)
        key_pos = turn * keys_per_turn + jnp.arange(keys_per_turn)[None]  # [1, p]
        visible = key_pos <= query_pos
        if window is not None:
            visible &= key_pos > query_pos - window
        visible = jnp.repeat(visible, group, axis=0) if num_queries > 1 else visible
        scores = jnp.where(visible[None], scores, _FLOOR)
        new_top = jnp.maximum(top, scores.max(-1))
        rescale = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        weighted = jnp.einsum("kqp,kph->kqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_top, total * rescale + weights.sum(-1), acc * rescale[..., None] + weighted

    shape = (num_kv_heads, num_queries * group)
    if sinks is None:
        top, total = jnp.full(shape, _FLOOR, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        top = jnp.tile(sinks.astype(jnp.float32)[:, None], (1, num_queries, 1)).reshape(shape)
        total = jnp.ones(shape, jnp.float32)
    acc = jnp.zeros((*shape, value_dim), jnp.float32)
    top, total, acc = lax.fori_loop(first_turn, last_turn, body, (top, total, acc))
    out = acc / jnp.maximum(total, 1e-30)[..., None] * v_scale
    return out.reshape(num_kv_heads, num_queries, group, value_dim).transpose(1, 0, 2, 3)
