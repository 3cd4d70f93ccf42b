"""The `fa` backend: shapes and layouts around the two kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from sgl_jax.ops.attention.api import AttentionLayer, RaggedBatch, split_heads, to_pool
from sgl_jax.ops.attention.fa import blocks as block_sizes
from sgl_jax.ops.attention.fa.blocks import ChunkBlocks, DecodeBlocks
from sgl_jax.ops.attention.fa.chunks import attend_chunks
from sgl_jax.ops.attention.fa.decode import attend_short
from sgl_jax.ops.attention.fa.prepare import Operands, operands
from sgl_jax.ops.attention.fa.ring import IDS
from sgl_jax.ops.attention.fa.tile import LANES, Scalars, Scores, row_tile

TOKENS = 16  # packed tokens come in multiples of this: the rows of a bfloat16 tile


def pool_head_dim(head_dim: int) -> int:
    """Return the head dim of a pool for this backend: whole lane tiles, as the chip's memory pads it anyway."""
    return -(-head_dim // LANES) * LANES


def page_size_multiple(dtype: DTypeLike) -> int:
    """Return what page sizes must be multiples of."""
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
    _check_pool(kv, head_dim)
    spec, divides = layer.spec, kv.dtype.itemsize == 1 or layer.kv_scales is not None
    if k is None and (head_dim != kv.shape[4] or divides):
        q, k, v = split_heads(q, kv.shape[1])  # heads are to be padded, or k and v divided and rounded
    num_heads = q.shape[1] - 2 * kv.shape[1] if k is None else q.shape[1]
    if blocks is None:
        blocks = _blocks(kv, batch.page_table.shape[1], num_heads, num_tokens)
    padded_tokens = -(-num_tokens // blocks[1].queries) * blocks[1].queries
    prepare, q_dtype = layer.prepare, q.dtype
    if prepare is not None and k is not None and divides:
        (q, k), prepare = prepare(q, k), None  # before they are divided and rounded
    k, v = (None if x is None else to_pool(x, kv.dtype, scale) for x, scale in zip((k, v), layer.scales, strict=True))
    # 8-bit pools: values go in as bfloat16 that the pool's type holds exactly.
    dtype = jnp.dtype(kv.dtype) if kv.dtype.itemsize > 1 else jnp.dtype(jnp.bfloat16)
    tokens = _Tokens(
        *_packed(q, k, v, padded_tokens, kv.shape[4], dtype),
        prepare=operands(prepare, padded_tokens, head_dim, kv.shape[4], q_dtype),
        sinks=_sink_lines(layer, num_heads),
    )
    table = jnp.pad(batch.page_table, ((0, 0), (0, -batch.page_table.shape[1] % IDS)))
    numbers = batch.num_short, layer.first_page, 0 if layer.window is None else layer.window
    scalars = Scalars(
        *(jnp.asarray(x, jnp.int32).reshape(1) for x in numbers),
        kv_scales=None if layer.kv_scales is None else jnp.stack(layer.scales).astype(jnp.float32),
    )
    scores = Scores(spec.scale, spec.softcap, spec.temperature_length, dtype)
    value_dim = head_dim if spec.value_dim is None else spec.value_dim
    decode = functools.partial(
        attend_short,
        num_heads=num_heads,
        value_dim=pool_head_dim(value_dim),
        width=spec.width,
        scores=scores,
        has_window=layer.window is not None,
        blocks=blocks[0],
    )
    most = min(_whole(min(len(batch.kv_lens), num_tokens) * spec.width), _whole(num_tokens))
    out, kv = _in_turn(decode, tokens, kv, scalars, batch, table, most, spec.width, blocks[0].max_tokens)
    out, kv = attend_chunks(
        tokens.q,
        tokens.k,
        tokens.v,
        out,
        kv,
        scalars,
        batch.kv_lens,
        batch.cu_q_lens,
        jnp.pad(batch.token_page, (0, padded_tokens - num_tokens)),
        table.reshape(-1),
        tokens.sinks,
        tokens.prepare,
        num_heads=num_heads,
        lines_set=most,
        scores=scores,
        has_window=layer.window is not None,
        blocks=blocks[1],
    )
    heads_first = out.ndim == 3
    out = out.swapaxes(0, 1) if heads_first else out.reshape(padded_tokens, num_heads, -1)
    return out[:num_tokens, :, :value_dim].astype(q_dtype), kv


class _Tokens(NamedTuple):
    """The packed tokens as the kernels take them, T of them with padding."""

    q: jax.Array  # [T, N * H] or [N, T, H]; fused: [T, (N + 2K) * H]
    k: jax.Array | None  # [T, K * H]
    v: jax.Array | None
    prepare: Operands
    sinks: jax.Array | None  # f32[N + 8, 128]: the same in all lanes

    def cut(self, start: jax.Array | int, lines: int) -> _Tokens:
        """Take the tokens [start, start + lines)."""

        def some(x: jax.Array) -> jax.Array:
            x = x.swapaxes(0, -2)  # cut with heads first, latent queries were copied twice
            if isinstance(start, int):
                x = x[start : start + lines]
            else:
                room = [(0, lines)] + [(0, 0)] * (x.ndim - 1)
                x = lax.dynamic_slice_in_dim(jnp.pad(x, room), start, lines)
            return x.swapaxes(0, -2)

        k, v, rope = (None if x is None else some(x) for x in (self.k, self.v, self.prepare.rope))
        return self._replace(q=some(self.q), k=k, v=v, prepare=self.prepare._replace(rope=rope))


def _in_turn(
    decode: Callable[..., tuple[jax.Array, jax.Array]],
    tokens: _Tokens,
    kv: Num[Array, "LP K planes page HP"],
    scalars: Scalars,
    batch: RaggedBatch,
    table: Int[Array, "S ids"],
    lines: int,
    width: int,
    at_once: int,
) -> tuple[jax.Array, Num[Array, "LP K planes page HP"]]:
    """Run `decode` over the short rows, which have at most `lines` tokens, in turns of `at_once` tokens. Returns o, whose
    first `lines` lines are set, and the pool."""

    def attend(tokens: _Tokens, kv, scalars, rows, cu_q_lens, lines):
        q, k, v, prepare, sinks = tokens
        flat = table[rows].reshape(-1)
        return decode(q, k, v, kv, scalars, batch.kv_lens[rows], cu_q_lens, flat, sinks, prepare, num_tokens=lines)

    if lines <= at_once:  # the kernel takes what it needs of the whole arrays
        return attend(tokens, kv, scalars, slice(None), batch.cu_q_lens, lines)
    per_turn = at_once // width
    firsts = range(0, min(len(batch.kv_lens), -(-lines // width)), per_turn)
    starts = [first if width == 1 else batch.cu_q_lens[first] for first in firsts]
    parts = []
    for first, start in zip(firsts, starts, strict=True):
        some = _whole(min(at_once, lines - first * width))
        mine = scalars._replace(num_short=jnp.clip(scalars.num_short - first, 0, per_turn))
        cu_q_lens = batch.cu_q_lens[first : first + per_turn + 1] - start
        part, kv = attend(tokens.cut(start, some), kv, mine, slice(first, first + per_turn), cu_q_lens, some)
        parts.append(part)
    out = jnp.concatenate(parts, axis=-2)
    if width > 1:  # the tokens of a turn begin where those of the turn before end
        token = jnp.arange(lines)
        turn = jnp.sum(token[:, None] >= jnp.stack(starts[1:]), axis=1)
        line = turn * at_once + token - jnp.stack(starts)[turn]
        out = jnp.take(out, line, axis=-2, mode="fill", fill_value=0)
    rest = [(0, 0)] * (out.ndim - 2) + [(0, tokens.q.shape[-2] - lines), (0, 0)]
    return jnp.pad(out, rest), kv


def _packed(
    q: Float[Array, "T heads H"],
    k: Num[Array, "T K H"] | None,
    v: Num[Array, "T K H"] | None,
    num_tokens: int,
    pool_dim: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Pad to num_tokens and to the pool's head dim, and lay out as the products around have them.

    Queries are products of all heads at once, or of each head by itself (models/mla.py, where v is None).
    """

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, num_tokens - len(x)), (0, 0), (0, pool_dim - x.shape[2]))).astype(dtype)

    def flat(x: jax.Array) -> jax.Array:
        return padded(x).reshape(num_tokens, -1)

    heads_first = v is None and k is not None
    k, v = (None if x is None else flat(x) for x in (k, v))
    return padded(q).swapaxes(0, 1) if heads_first else flat(q), k, v


def _sink_lines(layer: AttentionLayer, num_heads: int) -> Float[Array, "lines 128"] | None:
    if layer.sinks is None:
        return None
    lines = jnp.pad(layer.sinks.astype(jnp.float32), (0, 8))[:, None]
    return jnp.broadcast_to(lines, (num_heads + 8, LANES))


def _blocks(kv: jax.Array, row_pages: int, num_heads: int, num_tokens: int) -> tuple[DecodeBlocks, ChunkBlocks]:
    """Choose the sizes for the chip that the program is traced for."""
    chip = block_sizes.current_chip()
    return (
        block_sizes.decode_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads),
        block_sizes.chunk_blocks(chip, kv.shape, kv.dtype, row_pages, num_heads, _whole(num_tokens)),
    )


def _whole(tokens: int) -> int:
    """Round up to a multiple of TOKENS."""
    return -(-tokens // TOKENS) * TOKENS


def _check_pool(kv: jax.Array, head_dim: int) -> None:
    if kv.shape[4] != pool_head_dim(head_dim):
        raise ValueError(
            f"attention backend fa needs a pool of head dim {pool_head_dim(head_dim)} for heads of {head_dim}, "
            f"this one has {kv.shape[4]}"
        )
    if kv.shape[3] % page_size_multiple(kv.dtype):
        raise ValueError(
            f"attention backend fa needs pages of a multiple of {page_size_multiple(kv.dtype)} {kv.dtype} tokens; "
            f"--page-size is {kv.shape[3]}"
        )
