"""Inside the kernels for TPU: tokens times a block of a matrix, whose values are decoded in VMEM.

The matrix unit takes narrow values as they are. So for few tokens each group is multiplied with them, and its sums with the
group's scales: exact, and the least work. For many tokens that costs more than to scale the values first, rounded to the
tokens' dtype; they then fill the depth of the unit, which is 256 inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

LANES = 128
ROWS = 256  # rows of the matrix in one product
TURN = 1024  # inputs in a turn of the loop
_FEW_ROWS = 256  # tokens times groups that share a lane tile: so many or fewer, and sums are scaled


class Block(NamedTuple):
    """Refs of a block of the planes: outputs b of one matrix."""

    values: jax.Array  # [b, I], or [I, b] where I does not fill lane tiles
    scales: jax.Array  # f32[G, b]
    offsets: jax.Array | None = None  # f32[G, b]


def multiply(x, sums, w: Block, store) -> None:
    """Multiply tokens x [T, I] with a block. With offsets, `sums` f32[T, G] are the tokens' inputs summed by group.

    Gives the product of some outputs at a time, f32[T, n], and which columns they are, to `store`.
    """
    outputs = w.scales.shape[1]
    rows = min(outputs, ROWS if outputs % ROWS == 0 else LANES)

    def part(i, carry):
        columns = pl.ds(pl.multiple_of(i * rows, rows), rows)
        product = _product(x, w, columns, rows)
        if w.offsets is not None and sums is not None:
            product -= jnp.dot(sums[...], w.offsets[:, columns], precision=lax.Precision.HIGHEST)
        store(columns, product)
        return carry

    lax.fori_loop(0, outputs // rows, part, 0)


def _product(x, w: Block, columns, rows: int) -> Float[Array, "T n"]:
    """Multiply tokens with values times scales of some outputs of a block."""
    (tokens, inputs), groups = x.shape, w.scales.shape[0]
    upright = inputs % LANES != 0
    if groups == 1:
        values = w.values[:, columns] if upright else w.values[columns, :]
        return _dot(x[...], values, 0 if upright else 1) * w.scales[:, columns]
    if upright:
        return _dot(x[...], _scaled_upright(w.values[:, columns], w.scales[:, columns], x.dtype), 0)
    group = inputs // groups
    step = max(group, LANES)
    turn = step * max(n for n in range(1, max(1, TURN // step) + 1) if inputs % (step * n) == 0)
    multiplied = _scaled_sums if tokens * step <= _FEW_ROWS * group else _scaled_values

    def add(i, total):
        at = pl.multiple_of(i * turn, turn)
        scales = _rows(w.scales, i, turn // group, columns)
        return total + multiplied(x[:, pl.ds(at, turn)], w.values[columns, pl.ds(at, turn)], scales, group)

    return lax.fori_loop(0, inputs // turn, add, jnp.zeros((tokens, rows), jnp.float32))


def _rows(plane, i, number: int, columns) -> Float[Array, "G n"]:
    """Return rows i * number and on of a plane: at once if they are whole registers of 8, else one by one."""
    if number % 8 == 0:
        return plane[pl.ds(pl.multiple_of(i * number, number), number), columns]
    return jnp.concatenate([plane[pl.ds(i * number + n, 1), columns] for n in range(number)])


def _scaled_sums(
    x: Float[Array, "T I"], values: Shaped[Array, "n I"], scales: Float[Array, "G n"], group: int
) -> Float[Array, "T n"]:
    """Multiply each group by itself. Groups of a lane tile share a product, each with tokens that are zero elsewhere."""
    tokens, step = len(x), max(group, LANES)
    sharing = step // group
    owner = lax.broadcasted_iota(jnp.int32, (tokens, step), 1) // group
    total = jnp.zeros((tokens, len(values)), jnp.float32)
    for n, at in enumerate(range(0, x.shape[1], step)):
        mine = x[:, at : at + step]
        if sharing > 1:
            mine = jnp.concatenate([jnp.where(owner == j, mine, jnp.zeros_like(mine)) for j in range(sharing)])
        products = _dot(mine, values[:, at : at + step], 1)
        for j in range(sharing):
            total += products[j * tokens : (j + 1) * tokens] * scales[n * sharing + j]
    return total


def _scaled_values(
    x: Float[Array, "T I"], values: Shaped[Array, "n I"], scales: Float[Array, "G n"], group: int
) -> Float[Array, "T n"]:
    """Multiply with values that are scaled first. The matrix unit spreads each scale, as two bfloat16, over its group."""
    inputs, high = x.shape[1], scales.astype(jnp.bfloat16)
    parts = jnp.concatenate([high, (scales - high.astype(jnp.float32)).astype(jnp.bfloat16)])  # [2 G, n]
    column = lax.broadcasted_iota(jnp.int32, (len(parts), inputs), 1) // group
    members = column == lax.broadcasted_iota(jnp.int32, (len(parts), inputs), 0) % len(scales)
    spread = _dot(parts.T, members.astype(jnp.bfloat16), 0)
    return _dot(x, (values.astype(jnp.float32) * spread).astype(x.dtype), 1)


def _scaled_upright(values: Shaped[Array, "I n"], scales: Float[Array, "G n"], dtype) -> Float[Array, "I n"]:
    groups = len(scales)
    size = len(values) // groups
    scaled = [values[g * size : (g + 1) * size].astype(jnp.float32) * scales[g : g + 1] for g in range(groups)]
    return jnp.concatenate(scaled).astype(dtype)


def _dot(x: Float[Array, "T I"], values: Shaped[Array, "..."], contracted: int) -> Float[Array, "T n"]:
    return lax.dot_general(x, values, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
