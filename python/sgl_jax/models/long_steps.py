"""Products of steps of many tokens, with barriers across which the compiler for TPUs does not fuse.

It would put a norm into the product behind it and compute it again for each tile of outputs, and do the same with an activation
(docs/decisions/0037-barriers-in-long-steps.md). Matrices that are quantised or have adapters are multiplied without barriers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sgl_jax.models.linear import Linear
from sgl_jax.models.quantised import Matrix

_LEAST_TOKENS = 1024  # the least tokens and rows of a matrix with which barriers are faster (benchmarks/LOG.md)
_LEAST_ROWS_BEHIND_NORM = 4096
_LEAST_ROWS_OF_GATE_UP = 2 * 8192
_PIECE_BYTES = 96 << 20  # bytes of gate and its product with up; the memory of a v6e core has 128 MiB


def behind_norm(h: Float[Array, "T D"], w: Matrix[jax.Array] | None, *, has_barriers: bool) -> Float[Array, "T D"]:
    """Return the normed tokens that `w` will multiply, behind a barrier if the step is long."""
    return lax.optimization_barrier(h) if has_barriers and _gains(h, w, _LEAST_ROWS_BEHIND_NORM) else h


def mlp(
    h: Float[Array, "T D"],
    gate_up: Matrix[jax.Array] | None,
    bias: Float[Array, " FF"] | None,
    down: Matrix[jax.Array],
    act: Callable[[Float[Array, "T F"], Float[Array, "T F"]], Float[Array, "T F"]],
    linear: Linear,
    *,
    has_barriers: bool,
) -> Float[Array, "T D"]:
    """Return down(act(gate, up)). In a long step gate and up are two products, the second of which ends with the activation, and
    the tokens are multiplied in pieces whose activations stay on the chip."""
    if not (has_barriers and _gains(h, gate_up, _LEAST_ROWS_OF_GATE_UP)):
        return linear(act(*jnp.split(linear(h, gate_up, bias, site="gate_up"), 2, axis=-1)), down, site="down")
    assert isinstance(gate_up, jax.Array)
    biases = (None, None) if bias is None else jnp.split(bias, 2)
    halves = [*zip(jnp.split(gate_up, 2), biases, strict=True)]
    outs = []
    for piece in jnp.split(h, _num_pieces(len(h), len(gate_up) * h.dtype.itemsize)):
        piece = lax.optimization_barrier(piece)
        gate, up = (linear(piece, *half, site="gate_up") for half in halves)
        outs.append(linear(lax.optimization_barrier(act(gate, up)), down, site="down"))
    return jnp.concatenate(outs)


def _gains(h: Float[Array, "T D"], w: Matrix[jax.Array] | None, least_rows: int) -> bool:
    return isinstance(w, jax.Array) and len(h) >= _LEAST_TOKENS and len(w) >= least_rows


def _num_pieces(num_tokens: int, token_bytes: int) -> int:
    """Return into how many equal pieces of _LEAST_TOKENS or more the tokens are divided; 1 if that cannot be."""
    least, most = -(-num_tokens * token_bytes // _PIECE_BYTES), num_tokens // _LEAST_TOKENS
    return next((n for n in range(least, most + 1) if num_tokens % n == 0), 1)
