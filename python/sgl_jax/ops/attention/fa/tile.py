"""Online softmax over one tile of keys, in registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
AHEAD = 2  # scores asked for before the first softmax; 0, 1 and 3 need 8 to 22 % more bundles (docs/decisions/0012)
FLOOR = -1e30  # finite: a query with no key in sight yet must not produce inf - inf


class Scalars(NamedTuple):
    """What changes from step to step or from layer to layer, i32[1] each: an array of them would be an operation."""

    num_single: Any  # rows with one token
    first_page: Any  # of the layer
    window: Any  # tokens; 0 if there is none


@dataclasses.dataclass(frozen=True)
class Scores:
    """How products of q and k become scores, and what the stored V is multiplied with."""

    scale: float
    softcap: float | None
    v_scale: float
    dtype: Any  # of the operands of both products


def row_tile(dtype: Any) -> int:
    """Rows of a tile in memory: the granularity at which pages can be cut."""
    return 32 // jnp.dtype(dtype).itemsize


def join_pages(buffer: Any, slot: Any, first: Any, count: int, head: Any, which: int) -> jax.Array:
    """K (which 0) or V (1) of one KV head in pages [first, first + count) of a ring slot: [count * page, H]."""
    return jnp.concatenate([buffer[slot, first + j, head, which] for j in range(count)], axis=0)


def fold_lanes(x: jax.Array) -> jax.Array:
    """[R, W] to [R, 128] by adding the lane tiles; a narrow x goes to the first lanes."""
    if x.shape[1] % LANES:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2][1:], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


State = tuple[jax.Array, jax.Array, jax.Array]  # top [R, 1], total [R, 128] whose lanes are to be summed, acc [R, H]
Keep = Callable[[tuple[int, ...], int], jax.Array]


def attend(
    states: list[State],
    queries: list[jax.Array],
    keys: list[Callable[[int], jax.Array]],
    keep: Keep | None,
    scores: Scores,
) -> list[State]:
    """One step of online softmax for several heads: queries [R, H] each, and functions that load K (of 0) or V (of 1)
    of its keys, [W, H].

    keep(shape, axis) says which keys count, where key i lies at index i of the axis: scores and V of others are not
    used, whatever they hold. The matrix units keep program order, so the scores of the next heads are asked for before
    the softmax of this one: the one fills the time of the other.
    """
    precision = lax.Precision.HIGHEST if scores.dtype == jnp.float32 else None

    def dot(a, b, axes):
        # The matrix units take bfloat16 by float8 as it is: a third of the bundles of a conversion before, on v6e.
        b = b if b.dtype in (scores.dtype, jnp.float8_e4m3fn) else b.astype(scores.dtype)
        return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def score(head: int) -> jax.Array:
        s = dot(queries[head], keys[head](0), ((1,), (1,))) * scores.scale
        if scores.softcap is not None:
            s = scores.softcap * jnp.tanh(s * (1 / scores.softcap))
        return s if keep is None else jnp.where(keep(s.shape, 1), s, FLOOR)

    def weigh(head: int, s: jax.Array) -> State:
        top, total, acc = states[head]
        new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
        rescale = jnp.exp(top - new_top)
        p = jnp.exp(s - new_top)
        v = keys[head](1)
        if keep is not None:
            v = jnp.where(keep(v.shape, 0), v.astype(jnp.float32), 0)
        weighted = dot(p.astype(scores.dtype), v, ((1,), (0,)))
        return new_top, total * rescale + fold_lanes(p), acc * rescale + weighted

    asked: list[jax.Array] = []
    done: list[State] = []
    for head in range(len(states)):
        asked.append(score(head))
        if head >= AHEAD:
            done.append(weigh(head - AHEAD, asked[head - AHEAD]))
    for head in range(len(done), len(states)):
        done.append(weigh(head, asked[head]))
    return done
