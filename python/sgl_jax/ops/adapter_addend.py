"""Addends of LoRA adapters to products: the contract, plain XLA, and the library for CPUs (cpu/adapters.cc).

An adapter adds (x Aᵀ) B to the product of x with a matrix (https://arxiv.org/abs/2106.09685). The adapters of all slots lie
below each other. In plain XLA two products with all of them serve tokens of any adapters at once: between the two, what other
slots than a token's own give is set to zero. That is little work beside the matrix itself where its sides are long.
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sgl_jax.ops.cpu.library import Library

_MULTIPLE = 16  # numbers of a vector in the widest library; it divides inputs and outputs


@runtime_checkable  # so that tests can check annotations
class AdapterAddend(Protocol):
    """Adds to each token's product, y, what its adapter gives; a token whose slot is -1 keeps its product.

    `a` and `b` have for each of P parts the R rows of each of A slots. The outputs of the parts lie side by side.
    """

    def __call__(
        self,
        y: Float[Array, "T OP"],
        x: Float[Array, "T I"],
        slots: Int[Array, " T"],
        a: Float[Array, "P AR I"],
        b: tuple[Float[Array, "AR _"], ...],
        num_slots: int,
    ) -> Float[Array, "T OP"]: ...


def plain_addend(
    y: Float[Array, "T OP"],
    x: Float[Array, "T I"],
    slots: Int[Array, " T"],
    a: Float[Array, "P AR I"],
    b: tuple[Float[Array, "AR _"], ...],
    num_slots: int,
) -> Float[Array, "T OP"]:
    """See AdapterAddend."""
    num_parts, rows, inputs = a.shape
    h = jnp.einsum("hi,ti->th", a.reshape(num_parts * rows, inputs), x)
    slot_of_column = np.arange(num_parts * rows) % rows // (rows // num_slots)
    h = jnp.where(slots[:, None] == slot_of_column, h, 0)
    parts = [jnp.einsum("th,ho->to", h[:, i * rows : (i + 1) * rows], each) for i, each in enumerate(b)]
    return y + (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)).astype(y.dtype)


def library_addend(library: Library) -> AdapterAddend:
    """Return the addend by the library, which changes y in place and multiplies each token with its own adapter alone, and
    plain XLA for what the library does not take."""
    return functools.partial(_library_addend, library=library)


def _library_addend(
    y: Float[Array, "T OP"],
    x: Float[Array, "T I"],
    slots: Int[Array, " T"],
    a: Float[Array, "P AR I"],
    b: tuple[Float[Array, "AR _"], ...],
    num_slots: int,
    *,
    library: Library,
) -> Float[Array, "T OP"]:
    dtypes = {each.dtype for each in (y, x, a, *b)}
    sides = (x.shape[1], *(each.shape[1] for each in b))
    if dtypes not in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")}) or any(side % _MULTIPLE for side in sides):
        return plain_addend(y, x, slots, a, b, num_slots)
    out = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return jax.ffi.ffi_call(library.adapters, out, input_output_aliases={0: 0})(y, x, slots, a, *b, slots=num_slots)
