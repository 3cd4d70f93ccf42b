"""The `fa` backend: shapes and layouts around the two kernels."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sgl_jax.ops.attention import api
from sgl_jax.ops.attention.fa import blocks as block_sizes
from sgl_jax.ops.attention.fa.blocks import ChunkBlocks, DecodeBlocks
from sgl_jax.ops.attention.fa.chunks import attend_chunks
from sgl_jax.ops.attention.fa.decode import attend_short
from sgl_jax.ops.attention.fa.kernel_call import Rows, Static, Tokens
from sgl_jax.ops.attention.fa.ring import IDS
from sgl_jax.ops.attention.fa.tile import LANES, Prepare, Scores, row_tile

TOKENS = 16  # packed tokens come in multiples of this: the rows of a bfloat16 tile


def pool_head_dim(head_dim: int) -> int:
    """Return the head dim of a pool for this backend: whole lane tiles, as the chip's memory pads it anyway."""
    return -(-head_dim // LANES) * LANES


def paged_attention(
    q: api.Queries,
    k: api.NewKV | None,
    v: api.NewKV | None,
    kv: api.Pool,
    batch: api.RaggedBatch,
    layer: api.AttentionLayer,
    *,
    blocks: tuple[DecodeBlocks, ChunkBlocks] | None = None,
) -> tuple[api.Output, api.Pool]:
    """See api.Attention. The pool's head dim HP is pool_head_dim(H), its page size a multiple of tile.row_tile.

    `blocks`: sizes other than those for the chip that the program is traced for (for tests).
    """
    num_tokens, _, head_dim = q.shape
    _check_pool(kv, head_dim)
    if blocks is None:
        chip, row_pages = block_sizes.current_chip(), batch.page_table.shape[1]
        num_heads = q.shape[1] - 2 * kv.shape[1] if k is None else q.shape[1]
        blocks = (
            block_sizes.decode_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads),
            block_sizes.chunk_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads, _whole(num_tokens)),
        )
    padded_tokens = -(-num_tokens // blocks[1].queries) * blocks[1].queries
    tokens, static = _pack(q, k, v, kv, layer, padded_tokens)
    numbers = batch.num_short, layer.first_page, 0 if layer.window is None else layer.window
    rows = Rows(
        *(jnp.asarray(x, jnp.int32).reshape(1) for x in numbers),
        kv_scales=None if layer.kv_scales is None else jnp.stack(layer.scales).astype(jnp.float32),
        kv_lens=batch.kv_lens,
        cu_q_lens=batch.cu_q_lens,
        token_page=jnp.pad(batch.token_page, (0, padded_tokens - num_tokens)),
        table=jnp.pad(batch.page_table, ((0, 0), (0, -batch.page_table.shape[1] % IDS))),
    )
    out, most = tokens.outputs(static), 0
    if batch.has_short:
        most = min(_whole(min(len(batch.kv_lens), num_tokens) * static.width), _whole(num_tokens))
        out, kv = _attend_short_in_turn(tokens, rows, kv, static, blocks[0], most)
    out, kv = attend_chunks(tokens, rows, out, kv, static, blocks[1], lines_set=most)
    out = out.swapaxes(0, 1) if out.ndim == 3 else out.reshape(padded_tokens, static.num_heads, -1)
    value_dim = head_dim if layer.spec.value_dim is None else layer.spec.value_dim
    return out[:num_tokens, :, :value_dim].astype(q.dtype), kv


def _pack(
    q: api.Queries, k: api.NewKV | None, v: api.NewKV | None, kv: api.Pool, layer: api.AttentionLayer, num_tokens: int
) -> tuple[Tokens, Static]:
    """Pad the arrays to num_tokens and to the pool's head dim, in its dtype, and lay them out as the products around have
    them: queries are products of all heads at once, or of each head by itself (models/mla.py, where v is None)."""
    spec, q_dtype, head_dim = layer.spec, q.dtype, q.shape[2]
    _, num_kv_heads, planes, page_size, pool_dim = kv.shape
    divides = kv.dtype.itemsize == 1 or layer.kv_scales is not None
    if k is None and (head_dim != pool_dim or divides):
        q, k, v = api.split_heads(q, num_kv_heads)  # heads are to be padded, or k and v divided and rounded
    num_heads = q.shape[1] - 2 * num_kv_heads if k is None else q.shape[1]
    prepare = layer.prepare or api.QKPrepare(None, None, None)
    if k is not None and divides:
        (q, k), prepare = prepare(q, k), api.QKPrepare(None, None, None)  # before they are divided and rounded
    k, v = (
        None if x is None else api.to_pool(x, kv.dtype, scale) for x, scale in zip((k, v), layer.scales, strict=True)
    )
    # 8-bit pools: values go in as bfloat16 that the pool's type holds exactly.
    dtype = jnp.dtype(kv.dtype) if kv.dtype.itemsize > 1 else jnp.dtype(jnp.bfloat16)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, num_tokens - len(x)), (0, 0), (0, pool_dim - x.shape[2]))).astype(dtype)

    def flat(x: jax.Array) -> jax.Array:
        return padded(x).reshape(num_tokens, -1)

    heads_first = v is None and k is not None
    k, v = (None if x is None else flat(x) for x in (k, v))
    q = padded(q).swapaxes(0, 1) if heads_first else flat(q)
    static_prepare, arrays = _prepare_operands(prepare, num_tokens, head_dim, pool_dim, q_dtype)
    value_dim = pool_head_dim(head_dim if spec.value_dim is None else spec.value_dim)
    scores = Scores(spec.scale, spec.softcap, spec.temperature_length, dtype)
    sinks = layer.sinks
    if sinks is not None:
        lines = jnp.pad(sinks.astype(jnp.float32), (0, 8))[:, None]
        sinks = jnp.broadcast_to(lines, (num_heads + 8, LANES))
    has_window = layer.window is not None
    sizes = num_heads, num_kv_heads, planes, page_size, pool_dim, value_dim, spec.width
    return Tokens(q, k, v, sinks, **arrays), Static(*sizes, has_window, spec.first_key, scores, static_prepare)


def _attend_short_in_turn(
    tokens: Tokens, rows: Rows, kv: jax.Array, static: Static, blocks: DecodeBlocks, lines: int
) -> tuple[jax.Array, jax.Array]:
    """Attend to the short rows, which have at most `lines` tokens, so many at a time as VMEM holds. Returns o, whose first
    `lines` lines are set, and the pool."""
    at_once, width = blocks.max_tokens, static.width
    if lines <= at_once:  # the kernel takes what it needs of the whole arrays
        return attend_short(tokens, rows, kv, static, blocks, num_tokens=lines)
    per_turn, cu_q_lens = at_once // width, rows.cu_q_lens
    firsts = range(0, min(len(rows.kv_lens), -(-lines // width)), per_turn)
    starts = [first if width == 1 else cu_q_lens[first] for first in firsts]
    parts = []
    for first, start in zip(firsts, starts, strict=True):
        end, some = first + per_turn, _whole(min(at_once, lines - first * width))
        mine = dataclasses.replace(
            rows,
            num_short=jnp.clip(rows.num_short - first, 0, per_turn),
            kv_lens=rows.kv_lens[first:end],
            cu_q_lens=cu_q_lens[first : end + 1] - start,
            table=rows.table[first:end],
        )
        part, kv = attend_short(tokens.cut(start, some), mine, kv, static, blocks, num_tokens=some)
        parts.append(part)
    out = jnp.concatenate(parts, axis=-2)
    if width > 1:  # the tokens of a turn begin where those of the turn before end
        token = jnp.arange(lines)
        turn = jnp.sum(token[:, None] >= jnp.stack(starts[1:]), axis=1)
        line = turn * at_once + token - jnp.stack(starts)[turn]
        out = jnp.take(out, line, axis=-2, mode="fill", fill_value=0)
    rest = [(0, 0)] * (out.ndim - 2) + [(0, tokens.q.shape[-2] - lines), (0, 0)]
    return jnp.pad(out, rest), kv


def _prepare_operands(
    prepare: api.QKPrepare, num_tokens: int, head_dim: int, pool_dim: int, dtype: DTypeLike
) -> tuple[Prepare, dict[str, jax.Array | None]]:
    """Return the static part of a QKPrepare, and its arrays as Tokens has them, padded to num_tokens lines and to the pool's
    head dim."""

    def line(weight: jax.Array | None) -> jax.Array | None:
        return None if weight is None else jnp.pad(weight, (0, pool_dim - head_dim))[None]

    half, rope = 0, prepare.rope
    if rope is not None:
        lines, width = rope.shape
        half = width // 2
        rope = jnp.pad(rope.astype(jnp.float32), ((0, num_tokens - lines), (0, pool_dim - width)))
    arrays = {"q_norm": line(prepare.q_norm), "k_norm": line(prepare.k_norm), "rope": rope}
    return Prepare(head_dim, prepare.eps, half, dtype), arrays


def _whole(tokens: int) -> int:
    """Round up to a multiple of TOKENS."""
    return -(-tokens // TOKENS) * TOKENS


def _check_pool(kv: jax.Array, head_dim: int) -> None:
    if kv.shape[4] != pool_head_dim(head_dim):
        raise ValueError(
            f"attention backend fa needs a pool of head dim {pool_head_dim(head_dim)} for heads of {head_dim}, "
            f"this one has {kv.shape[4]}"
        )
    if kv.shape[3] % row_tile(kv.dtype):
        raise ValueError(
            f"attention backend fa needs pages of a multiple of {row_tile(kv.dtype)} {kv.dtype} tokens; "
            f"--page-size is {kv.shape[3]}"
        )
