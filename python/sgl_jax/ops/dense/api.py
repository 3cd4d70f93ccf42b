"""The contracts of products of tokens with a matrix of weights, and the first of them in plain XLA."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

type Gated = Callable[[jax.Array, jax.Array], jax.Array]  # the activation of gate and up, element by element


@runtime_checkable  # so that tests can check annotations
class DenseProduct(Protocol):
    """Multiplies each token with each row of the matrix. The result has x's dtype unless `out_dtype` names a wider one."""

    def __call__(
        self, x: Float[Array, "T I"], w: Float[Array, "O I"], out_dtype: DTypeLike | None = None
    ) -> Float[Array, "T O"]: ...


@runtime_checkable
class GatedProduct(Protocol):
    """Multiplies each token with gate and up, which lie one below the other in one matrix, and applies the activation. Returns
    None where two operations are better."""

    def __call__(
        self, x: Float[Array, "T D"], gate_up: Float[Array, "F2 D"], gated: Gated
    ) -> Float[Array, "T F"] | None: ...


def plain_product(
    x: Float[Array, "T I"], w: Float[Array, "O I"], out_dtype: DTypeLike | None = None
) -> Float[Array, "T O"]:
    """See DenseProduct. The weights stand on the left, which is the fastest order on a CPU
    (docs/decisions/0006-weights-out-in.md)."""
    return jnp.einsum("oi,ti->ot", w, x, preferred_element_type=out_dtype).T


def no_gated_product(x: Float[Array, "T D"], gate_up: Float[Array, "F2 D"], gated: Gated) -> None:
    """See GatedProduct."""
