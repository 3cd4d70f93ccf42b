"""Grouped matmul in plain XLA: tiles of one group's rows, one after another, as many as there really are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_LARGEST_TILE = 32


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "L E O I"], layer: Int[Array, ""] | int, group_sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """See api.GroupedMatmul. A tile reads one matrix once: cost follows the groups that have rows, and their rows."""
    return by_tiles(x, group_sizes, w.shape[2], lambda rows, group: jnp.einsum("oi,mi->om", w[layer, group], rows).T)


def by_tiles(
    x: Float[Array, "M I"],
    group_sizes: Int[Array, " E"],
    num_outputs: int,
    product: Callable[[Float[Array, "m I"], Int[Array, ""]], Float[Array, "m O"]],
) -> Float[Array, "M O"]:
    """Multiply tiles of one group's rows each, by a function of the rows and the group."""
    num_rows, num_groups = len(x), len(group_sizes)
    tile = min(_LARGEST_TILE, max(2, num_rows // num_groups))  # one bf16 row costs more than two on CPU
    num_tiles = -(-group_sizes // tile)
    cu_tiles, cu_rows = jnp.cumsum(num_tiles), jnp.cumsum(group_sizes)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        """Multiply a tile. Its surplus rows are garbage that the next tile overwrites, or that lies past the last group."""
        group = jnp.searchsorted(cu_tiles, i, side="right", method="compare_all")
        done = (i - cu_tiles[group] + num_tiles[group]) * tile  # rows of the group in earlier tiles
        first = cu_rows[group] - group_sizes[group] + done
        rows = lax.dynamic_slice_in_dim(padded, first, tile)
        return lax.dynamic_update_slice_in_dim(out, product(rows, group).astype(out.dtype), first, 0)

    out = jnp.zeros((num_rows + tile, num_outputs), x.dtype)
    return lax.fori_loop(0, cu_tiles[-1], one_tile, out)[:num_rows]


def ragged_dot(
    x: Float[Array, "M I"], w: Float[Array, "L E O I"], layer: Int[Array, ""] | int, group_sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Multiply by XLA's ragged dot, which accelerators run well. It copies the layer's matrices out of the stack."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    product = lax.ragged_dot_general(x, w[layer], group_sizes, numbers, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
