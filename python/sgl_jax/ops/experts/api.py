"""The contract of routed experts, for plain matrices without biases.

The matrices of all layers come in one array, and the layer as an index, as in grouped_matmul.api.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from sgl_jax.ops.dense.api import Gated

LINE = 128  # D is a multiple of it


@runtime_checkable  # so that tests can check annotations
class RoutedExperts(Protocol):
    """Send each token through its experts and sum their weighed outputs: out[t] is the sum over its choices x of
    weights[t, x] * down[e] @ gated(gate[e] @ x[t], up[e] @ x[t]), with e = expert[t, x]; e = E is no expert here, and the others
    of a token are different. The matrices have x's dtype, and so has the result. `num_experts`: of the model, of which E are on
    this device, to estimate how many tokens they get. Returns None where the device has no room for such matrices."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "L E F2 D"],
        down: Float[Array, "L E D F"],
        layer: Int[Array, ""] | int,
        expert: Int[Array, "T X"],
        weights: Float[Array, "T X"],
        gated: Gated,
        num_experts: int,
    ) -> Float[Array, "T D"] | None: ...
