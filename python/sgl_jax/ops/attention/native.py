"""Paged attention in plain XLA: any platform, any head_dim, page size, window and soft cap.

A tile is a few consecutive queries of one row. Each tile walks its row's pages with online softmax, from the first page
its window reaches to its last key: the cost follows real lengths, not padding. Short rows are tiles of W queries; longer
ones are cut into tiles of TILE. On CPU tiles run one after another; elsewhere those of short rows are vectorised.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from sgl_jax.ops.attention.api import AttentionLayer, NewKV, Output, Pool, Queries, RaggedBatch, Scalar, write_kv

TILE = 32
KEYS_PER_TURN = 128  # keys a tile of TILE looks at per turn of its loop
_FLOOR = -1e30  # finite: a row with no key in sight yet must not produce inf - inf


def paged_attention(
    q: Queries,
    k: NewKV,
    v: NewKV | None,
    kv: Pool,
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    vectorise: bool = False,
) -> tuple[Output, Pool]:
    """See api.Attention. `vectorise`: run the short rows' tiles side by side (accelerators) instead of in turn (CPU)."""
    if layer.prepare is not None:
        q, k = layer.prepare(q, k)
    num_tokens, num_heads, head_dim = q.shape
    value_dim = head_dim if layer.spec.value_dim is None else layer.spec.value_dim
    kv = write_kv(kv, k, v, batch, layer)
    # On CPU small products are faster in float32 (benchmarks/LOG.md).
    sinks = None if layer.sinks is None else layer.sinks.reshape(k.shape[1], -1)
    walk = _Walk(kv, layer, sinks, value_dim, upcast=not vectorise)
    tiled = q.reshape(num_tokens, k.shape[1], -1, head_dim)
    out = jnp.zeros((num_tokens + max(TILE, layer.spec.width), *tiled.shape[1:3], value_dim), q.dtype)
    attend = _attend_short_together if vectorise else _attend_short_in_turn
    out = attend(walk, tiled, out, batch)
    if num_tokens > 1:
        out = _attend_chunks(walk, tiled, out, batch)
    return out[:num_tokens].reshape(num_tokens, num_heads, value_dim), kv


def _attend_short_together(
    walk: _Walk, tiled: Float[Array, "T K G H"], out: Float[Array, "U K G V"], batch: RaggedBatch
) -> Float[Array, "U K G V"]:
    """Attend to the short rows side by side. Lines of other rows get garbage, which _attend_chunks overwrites."""
    num_tokens, num_rows, width = len(tiled), len(batch.kv_lens), walk.layer.spec.width
    rows = jnp.arange(min(num_rows, num_tokens))
    tiles = jax.vmap(lambda row: _short_tile(walk, tiled, batch, row, walk.pages_per_turn))(rows)
    if width == 1:
        lines = tiles[:, 0]
    else:
        token = jnp.arange(min(len(rows) * width, num_tokens))
        row = jnp.minimum(batch.token_row[token], len(rows) - 1)
        lines = tiles[row, jnp.minimum(token - batch.cu_q_lens[row], width - 1)]
    return lax.dynamic_update_slice_in_dim(out, lines.astype(out.dtype), 0, 0)


def _attend_short_in_turn(
    walk: _Walk, tiled: Float[Array, "T K G H"], out: Float[Array, "U K G V"], batch: RaggedBatch
) -> Float[Array, "U K G V"]:
    """Attend to the short rows one by one. The surplus queries of a row write garbage, which later rows overwrite."""
    width = walk.layer.spec.width

    def one(row: jax.Array, out: jax.Array) -> jax.Array:
        tile = _short_tile(walk, tiled, batch, row, 1)
        if width == 1:
            return out.at[row].set(tile[0].astype(out.dtype))
        return lax.dynamic_update_slice_in_dim(out, tile.astype(out.dtype), batch.cu_q_lens[row], 0)

    return lax.fori_loop(0, batch.num_short, one, out)


def _short_tile(
    walk: _Walk, tiled: Float[Array, "T K G H"], batch: RaggedBatch, row: Scalar, pages_per_turn: int
) -> Float[Array, "W K G V"]:
    """Attend with the W queries of a row; those beyond its own give garbage."""
    width = walk.layer.spec.width
    kv_len = jnp.where(row < batch.num_short, batch.kv_lens[row], 0)
    if width == 1:
        query = lax.dynamic_slice_in_dim(tiled, row, 1)
        return walk(query, batch.page_table[row], kv_len - 1, kv_len, pages_per_turn)
    first, end = batch.cu_q_lens[row], batch.cu_q_lens[row + 1]
    padded = jnp.pad(tiled, ((0, width), (0, 0), (0, 0), (0, 0)))
    query = lax.dynamic_slice_in_dim(padded, first, width)
    return walk(query, batch.page_table[row], kv_len - (end - first), kv_len, pages_per_turn)


def _attend_chunks(
    walk: _Walk, tiled: Float[Array, "T K G H"], out: Float[Array, "U K G V"], batch: RaggedBatch
) -> Float[Array, "U K G V"]:
    """Attend to the rows after the short ones, tile by tile. A tile's surplus queries write garbage that later tiles,
    which come in token order, overwrite, or that lies in padding."""
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
        tile = walk(query, batch.page_table[row], position, end, walk.pages_per_turn)
        return lax.dynamic_update_slice_in_dim(out, tile.astype(out.dtype), first, 0)

    return lax.fori_loop(0, cu_tiles[-1], one_tile, out)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The walk of a tile over its row's pages."""

    kv: Pool
    layer: AttentionLayer
    sinks: Float[Array, "K G"] | None
    value_dim: int
    upcast: bool  # compute in float32, one page of one row at a time (CPU)

    @property
    def pages_per_turn(self) -> int:
        """Pages of a turn for chunks, and for short rows side by side."""
        return max(1, KEYS_PER_TURN // self.kv.shape[3])

    def __call__(
        self,
        q: Float[Array, "B K G H"],
        pages: Int[Array, " pages"],
        position: Scalar,
        kv_end: Scalar,
        pages_per_turn: int,
    ) -> Float[Array, "B K G V"]:
        """Attend with queries at `position` and the positions after it to the keys before kv_end; float32 result."""
        num_queries, num_kv_heads, group, head_dim = q.shape
        page_size, window, first_key = self.kv.shape[3], self.layer.window, self.layer.spec.first_key
        # Where rows go side by side, all keys of a turn are in memory at once: long pages take several turns.
        parts = 1 if self.upcast or page_size % KEYS_PER_TURN else page_size // KEYS_PER_TURN
        keys_per_turn = pages_per_turn * page_size // parts
        query_pos = position + jnp.arange(num_queries)[:, None]  # [B, 1]
        pages = jnp.pad(pages, (0, -len(pages) % pages_per_turn))
        first = jnp.maximum(position - window + 1, first_key) if window is not None else first_key
        first_turn = first // keys_per_turn
        last_turn = (kv_end + keys_per_turn - 1) // keys_per_turn
        if self.upcast:
            q = q.astype(jnp.float32)
        grouped = q.transpose(1, 0, 2, 3).reshape(num_kv_heads, num_queries * group, head_dim)

        def body(turn: jax.Array, carry):
            top, total, acc = carry  # [K, B*G], [K, B*G], [K, B*G, V]
            k, v = self._load(pages, turn, pages_per_turn, parts)
            if self.upcast or self.kv.dtype.itemsize == 1:
                k, v = k.astype(grouped.dtype), v.astype(grouped.dtype)
            scores = self._scores(grouped, k, query_pos)
            key_pos = turn * keys_per_turn + jnp.arange(keys_per_turn)[None]  # [1, p]
            visible = key_pos <= query_pos
            if window is not None:
                visible &= key_pos > query_pos - window
            if first_key:
                visible &= key_pos >= first_key
            if num_queries > 1:  # a line for each head; of one query, one line does for all heads
                visible = jnp.repeat(visible, group, axis=0)
            scores = jnp.where(visible[None], scores, _FLOOR)
            new_top = jnp.maximum(top, scores.max(-1))
            rescale = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            weighted = jnp.einsum("kqp,kph->kqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_top, total * rescale + weights.sum(-1), acc * rescale[..., None] + weighted

        _, total, acc = lax.fori_loop(first_turn, last_turn, body, self._fresh(num_kv_heads, num_queries, group))
        out = acc / jnp.maximum(total, 1e-30)[..., None] * self.layer.scales[1]
        return out.reshape(num_kv_heads, num_queries, group, self.value_dim).transpose(1, 0, 2, 3)

    def _fresh(self, num_kv_heads: int, num_queries: int, group: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Make the state of a softmax over no keys yet, sinks aside."""
        shape = num_kv_heads, num_queries * group
        if self.sinks is None:
            top, total = jnp.full(shape, _FLOOR, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            top = jnp.tile(self.sinks.astype(jnp.float32)[:, None], (1, num_queries, 1)).reshape(shape)
            total = jnp.ones(shape, jnp.float32)
        return top, total, jnp.zeros((*shape, self.value_dim), jnp.float32)

    def _load(
        self, pages: Int[Array, " pages"], turn: jax.Array, pages_per_turn: int, parts: int
    ) -> tuple[Num[Array, "K p H"], Num[Array, "K p V"]]:
        """Read the keys and values of a turn."""
        kv, first_page = self.kv, self.layer.first_page
        _, num_kv_heads, planes, page_size, head_dim = kv.shape
        if pages_per_turn == 1 and self.upcast:
            block = lax.dynamic_index_in_dim(kv, pages[turn] + first_page, 0, keepdims=False)  # [K, planes, page, H]
            return block[:, 0], block[:, -1, :, : self.value_dim]
        ids = lax.dynamic_slice_in_dim(pages, turn // parts * pages_per_turn, pages_per_turn) + first_page
        # Read lines head by head. If whole pages were read and page_size equals H, XLA for TPU would copy the whole pool
        # into another layout, with K of all heads side by side.
        of_heads = kv.reshape(-1, page_size // parts, head_dim)
        at = (ids * num_kv_heads + jnp.arange(num_kv_heads)[:, None]) * planes  # [K, pages]
        k, v = (of_heads[(at + plane) * parts + turn % parts] for plane in (0, planes - 1))
        shape = num_kv_heads, pages_per_turn * page_size // parts, head_dim
        return k.reshape(shape), v.reshape(shape)[..., : self.value_dim]

    def _scores(
        self, grouped: Float[Array, "K q H"], k: Float[Array, "K p H"], query_pos: Int[Array, "B 1"]
    ) -> Float[Array, "K q p"]:
        """Return scaled and capped scores, with logn scaling where the model has it; q = B * G."""
        spec = self.layer.spec
        scores = jnp.einsum("kqh,kph->kqp", grouped, k, preferred_element_type=jnp.float32)
        scores = scores * (spec.scale * self.layer.scales[0])
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        if spec.temperature_length is not None:
            log_position = jnp.log(jnp.maximum(query_pos, 1).astype(jnp.float32))
            logn = jnp.maximum(1.0, log_position / math.log(spec.temperature_length))  # [B, 1]
            scores *= jnp.repeat(logn, grouped.shape[1] // len(query_pos), axis=0)
        return scores
