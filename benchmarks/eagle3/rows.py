"""Rows of a fixed number of tokens that hold whole sequences side by side, and attention inside each sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.models.decoder import Attend, Context
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.ops.attention.api import split_heads
from sgl_jax.ops.grouped_matmul.native import grouped_matmul

ROW = 640  # tokens
GROUP = 256  # answers that share rows: later answers leave the rows of earlier groups as they are


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed sequences, [rows, ROW] each. Padding belongs to sequence 0."""

    tokens: np.ndarray | jax.Array  # i32
    sequence: np.ndarray | jax.Array  # i32: number of the token's sequence, from 1 on in each row
    position: np.ndarray | jax.Array  # i32: in the sequence
    answers: np.ndarray | jax.Array  # bool: the next token belongs to the answer

    def __getitem__(self, rows: int | slice | np.ndarray) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def before(self, x: jax.Array) -> jax.Array:
        """Return x of the token before each, flat; zeros where a sequence begins."""
        return jnp.where(self.position.reshape(-1, 1) > 0, jnp.roll(x, 1, axis=0), 0)


def pack(answers: Sequence[tuple[list[int], list[int]]]) -> Rows:
    """Put prompts and their answers into rows, each into the first of its group that has room."""
    rows: list[list[tuple[list[int], list[int]]]] = []
    free: list[int] = []
    first = 0  # row of the group
    for number, (prompt, output) in enumerate(answers):
        first = len(rows) if number % GROUP == 0 else first
        length = len(prompt) + len(output)
        at = next((i for i in range(first, len(rows)) if free[i] >= length), len(rows))
        if at == len(rows):
            rows.append([])
            free.append(ROW)
        rows[at].append((prompt, output))
        free[at] -= length
    packed = Rows(*(np.zeros((len(rows), ROW), dtype) for dtype in ("i4", "i4", "i4", "?")))
    for i, row in enumerate(rows):
        _fill(packed[i], row)
    return packed


def _fill(packed: Rows, row: Sequence[tuple[list[int], list[int]]]) -> None:
    """Write the sequences of one row into its views."""
    begin = 0
    for number, (prompt, output) in enumerate(row, start=1):
        end = begin + len(prompt) + len(output)
        packed.tokens[begin:end] = prompt + output
        packed.sequence[begin:end] = number
        packed.position[begin:end] = np.arange(end - begin)
        packed.answers[begin + len(prompt) - 1 : end - 1] = True
        begin = end


def context(rows: Rows, config: DecoderConfig, dtype: str, attend: Attend) -> Context:
    valid = rows.sequence.reshape(-1) > 0
    return Context(rows.position.reshape(-1), valid, attend, grouped_matmul, dtype)


def heads(q, k, v, prepare, config: DecoderConfig):
    """Cut q, k and v of all rows apart, rotated: [rows, ROW, heads, H]."""
    if k is None:
        q, k, v = split_heads(q, config.num_kv_heads)
    q, k = prepare(q, k)
    return (x.reshape(-1, ROW, *x.shape[1:]) for x in (q, k, v))


def causal(rows: Rows, config: DecoderConfig) -> Attend:
    """Return attention of each token to those of its sequence up to itself. There is no pool."""
    at = jnp.arange(ROW)
    seen = (rows.sequence[:, :, None] == rows.sequence[:, None]) & (at[:, None] >= at)

    def attend(q, k, v, kv, *, layer, window, sinks, kv_scales=None, prepare=None):
        q, k, v = heads(q, k, v, prepare, config)
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
        scores = jnp.einsum("rtkgh,rskh->rkgts", q, k, preferred_element_type=jnp.float32) * config.scale
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30)).astype(v.dtype)
        out = jnp.einsum("rkgts,rskh->rtkgh", weights, v)
        return out.reshape(-1, config.num_heads, config.head_dim), kv

    return attend


def unrolled(rows: Rows, config: DecoderConfig, number: int) -> Attend:
    """Return attention of the pass `number` of a draft head over the same tokens; kv has keys and values of the passes before.

    A chain of drafts that the target's features begin at s has one key from each later pass: the pass that reads token s + j
    sees those of the first pass up to s and that of pass i at s + i, for i up to j.
    """
    at = jnp.arange(ROW)
    same = rows.sequence[:, :, None] == rows.sequence[:, None]
    first = same & (at[:, None] - number >= at) & (rows.position[:, None] >= 1)  # slot 0 has no feature before it

    def attend(q, k, v, kv, *, layer, window, sinks, kv_scales=None, prepare=None):
        q, k, v = heads(q, k, v, prepare, config)
        kv = (*kv, (k, v))
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
        keys = [jnp.roll(k, number - i, axis=1) for i, (k, _) in enumerate(kv)]
        values = [jnp.roll(v, number - i, axis=1) for i, (_, v) in enumerate(kv)]
        scores = jnp.einsum("rtkgh,rskh->rkgts", q, kv[0][0], preferred_element_type=jnp.float32)
        own = [jnp.einsum("rtkgh,rtkh->rkgt", q, k, preferred_element_type=jnp.float32) for k in keys[1:]]
        scores = jnp.where(first[:, None, None], scores * config.scale, -1e30)
        scores = jnp.concatenate([scores, *(x[..., None] * config.scale for x in own)], axis=-1)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("rkgts,rskh->rtkgh", weights[..., :ROW], kv[0][1])
        for i, v in enumerate(values[1:]):
            out += jnp.einsum("rkgt,rtkh->rtkgh", weights[..., ROW + i], v)
        return out.reshape(-1, config.num_heads, config.head_dim), kv

    return attend
