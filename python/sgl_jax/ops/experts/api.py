"""The contract of routed experts, for plain matrices without biases.

The matrices of all layers come in one array, and the layer as an index, as in grouped_matmul.api.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LINE = 128  # D is a multiple of it

type Gated = Callable[[jax.Array, jax.Array], jax.Array]  # the activation of gate and up, element by element


class SortedPairs(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert. Pairs without an expert come last."""

    order: Int[Array, " TX"]  # indices of choices: pair i is choice order[i] % X of token order[i] // X
    group_sizes: Int[Array, " E"]  # pairs of each expert


def sort_pairs(expert: Int[Array, "T X"], num_experts: int) -> SortedPairs:
    """Sort pairs by expert; those of number E have none."""
    flat = expert.reshape(-1)
    sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    return SortedPairs(jnp.argsort(flat, stable=True), sizes)


@runtime_checkable  # so that tests can check annotations
class RoutedExperts(Protocol):
    """Send each token through its experts and sum their weighed outputs: out[t] is the sum over its choices x of
    weights[t, x] * down[e] @ gated(gate[e] @ x[t], up[e] @ x[t]), with e = expert[t, x]; e = E is no expert. The matrices have
    x's dtype, and so has the result."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "L E F2 D"],
        down: Float[Array, "L E D F"],
        layer: Int[Array, ""] | int,
        expert: Int[Array, "T X"],
        weights: Float[Array, "T X"],
        gated: Gated,
    ) -> Float[Array, "T D"]: ...
