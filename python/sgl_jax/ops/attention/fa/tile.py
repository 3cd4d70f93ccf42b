"""Arithmetic on tiles in registers: norm and rotation of q and k, and online softmax over some keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
MATRIX = 256  # rows and columns of a matrix unit
AHEAD = 2  # products of scores that start before the first softmax (benchmarks/LOG.md)
FLOOR = -1e30  # finite, so that a query that has seen no key yet gives no inf - inf


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers that turn products of q and k into scores, and the factor of the stored V."""

    scale: float | jax.Array
    softcap: float | None
    temperature_length: int | None  # as in api.AttentionSpec
    dtype: DTypeLike  # dtype of both products' operands
    v_scale: float | jax.Array = 1.0

    def scaled(self, kv_scales: Any) -> Scores:
        """Take the factors of K and V, SMEM f32[2], into account; None: 1."""
        if kv_scales is None:
            return self
        return dataclasses.replace(self, scale=self.scale * kv_scales[0], v_scale=kv_scales[1])

    def factor(self, position: jax.Array) -> float | jax.Array:
        """Return the factor of capped products of queries at the positions, i32[R, 128]: a positive number, or
        f32[R, 128]."""
        last = self.scale if self.softcap is None else self.softcap
        if self.temperature_length is None:
            return last
        log = jnp.log(jnp.maximum(position, 1).astype(jnp.float32))
        return last * jnp.maximum(log * (1 / math.log(self.temperature_length)), 1)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """The static part of a QKPrepare."""

    head_dim: int  # without padding
    eps: float
    half: int  # the rotation pairs dimension i with half + i; 0: none
    dtype: DTypeLike  # rounded to after the norm, as it is where the norm is an operation of its own

    def __call__(self, x: jax.Array, norm: Any, rope: jax.Array | None) -> jax.Array:
        """Norm and rotate x f32[R, H] of one head, with the weight VMEM [1, H] and cos and sin f32[R, H] (QKPrepare)."""
        if norm is not None:
            weight = norm[...].astype(jnp.float32)
            mean = jnp.sum(x * x, axis=1, keepdims=True) * (1 / self.head_dim)
            x = (x * lax.rsqrt(mean + self.eps) * weight).astype(self.dtype).astype(jnp.float32)
        if rope is None:
            return x
        width, half = x.shape[1], self.half
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        left = lambda a: pltpu.roll(a, width - half, 1)  # lane i takes lane i + half  # noqa: E731
        right = (lambda a: pltpu.roll(a, half, 1)) if 2 * half != width else left
        cos = jnp.where(lane < half, rope, jnp.where(lane < 2 * half, right(rope), 1))
        sin = jnp.where(lane < half, -left(rope), jnp.where(lane < 2 * half, rope, 0))
        return x * cos + (left(x) if 2 * half == width else jnp.where(lane < half, left(x), right(x))) * sin


def of_head(shape: tuple[int, ...], lines: Any, head: Any, width: int) -> tuple[Any, ...]:
    """Return the index of a head's lines in an array of the shape [T, N * width] or [N, T, width]."""
    if len(shape) == 3:
        return head, lines
    if isinstance(head, int):
        return lines, slice(head * width, (head + 1) * width)
    return lines, pl.ds(pl.multiple_of(head * width, LANES), width)


def part_of(group: int, most: int) -> int:
    """Return the size of the parts that a group of query heads is cut into: a divisor of at most `most`, or the group where
    that would be small."""
    if group <= most:
        return group
    part = max(n for n in range(1, most + 1) if group % n == 0)
    return part if 4 * part >= most else group


def row_tile(dtype: DTypeLike) -> int:
    """Return the rows of a tile in memory, the granularity at which pages can be cut."""
    return 32 // jnp.dtype(dtype).itemsize


def join_pages(
    buffer: Any, slot: jax.Array, first: jax.Array | int, count: int, head: jax.Array | int, which: int, value_dim: int
) -> jax.Array:
    """Return K (which 0) or V (1) of one KV head in pages [first, first + count) of a ring slot: [count * page, H], V's first
    value_dim columns. In a pool of one plane V is a part of K."""
    plane = min(which, buffer.shape[3] - 1)
    columns = slice(0, value_dim if which else buffer.shape[5])
    return jnp.concatenate([buffer[slot, first + j, head, plane, :, columns] for j in range(count)], axis=0)


def fold_lanes(x: jax.Array) -> jax.Array:
    """Fold [R, W] to [R, 128] by adding the lane tiles; a narrow x goes to the first lanes."""
    if x.shape[1] % LANES:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def widen(x: jax.Array, width: int) -> jax.Array:
    """Widen [R, 128], whose lanes are all the same, to [R, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


# top [R, 128], all its lanes the same; total [R, 128], whose lanes are to be summed; acc [R, V]. With a top of
# [R, 1], which is spread over the lanes at each use, the chunk kernel takes 1499 bundles in place of 1335.
State = tuple[jax.Array, jax.Array, jax.Array]
Keep = Callable[[tuple[int, ...], int], jax.Array]
Load = Callable[[int], jax.Array]  # load(0): some keys [W, H]; load(1): their values [W, V]


def attend(
    states: list[State],
    queries: list[jax.Array],
    keys: list[list[Load]],
    keep: Keep | None,
    scores: Scores,
    factor: float | jax.Array,
) -> list[State]:
    """Take some keys into the online softmax (Milakov & Gimelshein 2018) of several products.

    A product has queries [R, H] and loads of its keys, one after the other. `factor` is the queries' Scores.factor, which
    is applied in the exponent only. keep(shape, axis) says which keys count, where key i lies at index i of the axis: the
    others may hold anything. The matrix units keep program order, so the scores of the next products start before the
    softmax of this one, which they overlap.
    """
    precision = lax.Precision.HIGHEST if scores.dtype == jnp.float32 else None

    def dot(a, b, axes):
        # The matrix units multiply bfloat16 with float8: a third of the bundles of a conversion first, on v6e.
        b = b if b.dtype in (scores.dtype, jnp.float8_e4m3fn) else b.astype(scores.dtype)
        return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    states = list(states)
    work = [(head, load) for head, loads in enumerate(keys) for load in loads]

    def score(head: int, load: Load) -> jax.Array:
        s = dot(queries[head], load(0), ((1,), (1,)))
        if scores.softcap is not None:
            s = jnp.tanh(s * (scores.scale * (1 / scores.softcap)))
        return s if keep is None else jnp.where(keep(s.shape, 1), s, FLOOR)

    factor = factor * math.log2(math.e)

    def weigh(head: int, load: Load, s: jax.Array) -> State:
        top, total, acc = states[head]
        new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
        rescale = jnp.exp2((top - new_top) * factor)
        by_line = isinstance(factor, jax.Array) and factor.ndim > 0
        p = jnp.exp2((s - widen(new_top, s.shape[1])) * (widen(factor, s.shape[1]) if by_line else factor))
        v = load(1)
        if keep is not None:
            v = jnp.where(keep(v.shape, 0), v.astype(jnp.float32), 0)
        width = acc.shape[1]
        if width % MATRIX == LANES and len(p) > LANES:
            # V leaves half of a matrix unit idle, which then sums p. With few queries loading the ones would take longer.
            one = lax.broadcasted_iota(jnp.int32, (len(v), LANES), 1) == 0
            v = jnp.concatenate([v, one.astype(jnp.float32).astype(v.dtype)], axis=1)
        weighted = dot(p.astype(scores.dtype), v, ((1,), (0,)))
        added = fold_lanes(p) if v.shape[1] == width else weighted[:, width:]
        return new_top, total * rescale + added, acc * widen(rescale, width) + weighted[:, :width]

    asked = [score(*each) for each in work[:AHEAD]]
    for i, (head, load) in enumerate(work):
        asked += [score(*each) for each in work[i + AHEAD : i + AHEAD + 1]]
        states[head] = weigh(head, load, asked[i])
    return states
