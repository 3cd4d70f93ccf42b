"""Row loads: device state of a row that a step's plan has no column for, written before the step.

A kind of load has one program, which writes it for many rows in one dispatch. LOADS is the table of kinds: what a row
needs of a kind is packed on the host and stored on the device by the two functions of its entry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sgl_jax.parallel.grid import MeshAxis
from sgl_jax.runtime.device_state import BIAS_WIDTH, IN_PROMPT, DeviceState
from sgl_jax.step_plan import RowLoad

_VECTOR_SIZE = 32 << 10  # i32 values of a load's vector: room for many rows, and as cheap to copy as a dispatch
_FOREVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LoadSizes:
    """The numbers on which the size of a row's payload depends."""

    num_rows: int  # R
    pages_per_row: int
    vocab_size: int  # V


@dataclasses.dataclass(frozen=True)
class LoadKind:
    """One kind of row state."""

    name: str
    size: Callable[[LoadSizes], int]  # i32 values of a row's payload
    pack: Callable[[RowLoad, np.ndarray], bool]  # fill the payload, zeros so far; False: the row needs none of the kind
    store: Callable[
        [DeviceState, jax.Array, jax.Array, MeshAxis], DeviceState
    ]  # (state, row, payload, vocabulary axis)

    @property
    def program(self) -> str:
        return f"load {self.name}"


def _pack_pages(load: RowLoad, payload: np.ndarray) -> bool:
    if load.pages is None:
        return False
    payload[: len(load.pages)] = load.pages
    return True


def _store_pages(state: DeviceState, row: jax.Array, pages: jax.Array, axis: MeshAxis) -> DeviceState:
    return dataclasses.replace(state, page_table=_put_row(state.page_table, row, pages))


def _pack_counts(load: RowLoad, counts: np.ndarray) -> bool:
    request = load.request
    if request is None or not request.params.has_penalties:
        return False
    np.add.at(counts, request.tokens[len(request.prompt) :], 1)
    counts[request.prompt] |= IN_PROMPT
    return True


def _store_counts(state: DeviceState, row: jax.Array, counts: jax.Array, axis: MeshAxis) -> DeviceState:
    shard = state.token_counts.shape[-1]
    own = lax.dynamic_slice_in_dim(counts, axis.index() * shard, shard)
    return dataclasses.replace(state, token_counts=_put_row(state.token_counts, row, own))


def _pack_bias(load: RowLoad, payload: np.ndarray) -> bool:
    """logit_bias as given, and the stop tokens at -inf until min_tokens are out."""
    request = load.request
    if request is None or not request.params.has_bias:
        return False
    p, stops = request.params, request.stop_token_ids
    ids, bits, until = payload.reshape(3, BIAS_WIDTH)
    n, end = len(p.logit_bias), len(p.logit_bias) + len(stops)
    ids[:n] = list(p.logit_bias)
    bits[:n] = np.array(list(p.logit_bias.values()), np.float32).view(np.int32)
    until[:n] = _FOREVER
    ids[n:end] = stops
    bits[n:end] = np.full(len(stops), -np.inf, np.float32).view(np.int32)
    until[n:end] = min(len(request.prompt) + p.min_tokens, _FOREVER)
    return True


def _store_bias(state: DeviceState, row: jax.Array, payload: jax.Array, axis: MeshAxis) -> DeviceState:
    ids, bits, until = payload.reshape(3, BIAS_WIDTH)
    return dataclasses.replace(
        state,
        bias_ids=_put_row(state.bias_ids, row, ids),
        bias_values=_put_row(state.bias_values, row, lax.bitcast_convert_type(bits, jnp.float32)),
        bias_until=_put_row(state.bias_until, row, until),
    )


def _put_row(array: jax.Array, row: jax.Array, values: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, values[None], row, axis=0)


LOADS: tuple[LoadKind, ...] = (
    LoadKind("pages", lambda sizes: sizes.pages_per_row, _pack_pages, _store_pages),
    LoadKind("counts", lambda sizes: sizes.vocab_size, _pack_counts, _store_counts),
    LoadKind("bias", lambda sizes: 3 * BIAS_WIDTH, _pack_bias, _store_bias),
)


@dataclasses.dataclass(frozen=True)
class LoadLayout:
    """The vector of a kind's program: the number n of rows to load, then N lines of a row and its payload, n in use."""

    kind: LoadKind
    sizes: LoadSizes

    @functools.cached_property
    def line(self) -> int:
        return 1 + self.kind.size(self.sizes)

    @functools.cached_property
    def capacity(self) -> int:
        """N, the most rows of a dispatch."""
        return max(1, min(self.sizes.num_rows, _VECTOR_SIZE // self.line))

    @property
    def size(self) -> int:
        return 1 + self.capacity * self.line

    def pack(self, loads: Iterable[RowLoad]) -> Iterator[np.ndarray]:
        """The vectors, i32[size] each, that load what the rows need of this kind: none, or as few as hold it."""
        vector, used = self.empty(), 0
        for load in loads:
            line = vector[1 + used * self.line :][: self.line]
            if not self.kind.pack(load, line[1:]):
                continue
            line[0] = load.row
            used += 1
            vector[0] = used
            if used == self.capacity:
                yield vector
                vector, used = self.empty(), 0
        if used:
            yield vector

    def empty(self) -> np.ndarray:
        """A vector that loads nothing."""
        return np.zeros(self.size, np.int32)

    def run(self, state: DeviceState, vector: Int[Array, " size"], *, axis: MeshAxis) -> DeviceState:
        """The program. `axis`: the one that shards the vocabulary."""
        lines = vector[1:].reshape(self.capacity, self.line)
        return lax.fori_loop(
            0, vector[0], lambda i, state: self.kind.store(state, lines[i, 0], lines[i, 1:], axis), state
        )


def pack_loads(layouts: Sequence[LoadLayout], loads: Sequence[RowLoad]) -> Iterator[tuple[str, np.ndarray]]:
    """The programs that load these rows, and their vectors: one of each kind that is needed, unless a kind has many
    rows."""
    for layout in layouts if loads else ():
        for vector in layout.pack(loads):
            yield layout.kind.program, vector
