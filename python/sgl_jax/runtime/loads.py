"""Row loads: device state of a row that a step's plan has no column for, written before the step.

LOADS is the table of kinds. Each kind has a function that packs a row's payload on the host, one that stores it on the
device, and one program, which loads many rows in a dispatch.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from sgl_jax.parallel.grid import MeshAxis
from sgl_jax.runtime.device_state import BIAS_WIDTH, IN_PROMPT, DeviceState, StateSizes
from sgl_jax.runtime.grammar_mask import unpacked
from sgl_jax.step_plan import RowLoad, mask_words

_VECTOR_SIZE = 32 << 10  # i32 values of a load's vector: room for many rows, and as cheap to copy as a dispatch
_FOREVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LoadKind:
    """Kind of row state that is loaded."""

    name: str
    size: Callable[[StateSizes], int]  # i32 values of a row's payload
    pack: Callable[[RowLoad, np.ndarray], bool]  # fills a payload of zeros; returns False if the row needs none
    # (state, row, payload, vocabulary axis) -> state with the payload in the row
    store: Callable[[DeviceState, jax.Array, jax.Array, MeshAxis], DeviceState]

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
    """Pack logit_bias as given, and the stop tokens at -inf until the output has min_tokens."""
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


def _pack_tokens(load: RowLoad, payload: np.ndarray) -> bool:
    if load.request is None:
        return False
    payload[: len(load.request.tokens)] = load.request.tokens
    return True


def _store_tokens(state: DeviceState, row: jax.Array, tokens: jax.Array, axis: MeshAxis) -> DeviceState:
    return dataclasses.replace(state, tokens=_put_row(state.tokens, row, tokens))


def _put_row(array: jax.Array, row: jax.Array, values: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, values[None], row, axis=0)


def _pack_mask(load: RowLoad, payload: np.ndarray) -> bool:
    if load.mask is None:
        return False
    payload[: len(load.mask)] = load.mask[: len(payload)]
    return True


def _store_mask(state: DeviceState, row: jax.Array, mask: jax.Array, axis: MeshAxis) -> DeviceState:
    allowed = unpacked(mask, state.grammar_mask.shape[-1], axis)
    return dataclasses.replace(state, grammar_mask=_put_row(state.grammar_mask, row, allowed))


LOADS: tuple[LoadKind, ...] = (
    LoadKind("pages", lambda sizes: sizes.pages_per_row, _pack_pages, _store_pages),
    LoadKind("counts", lambda sizes: sizes.vocab_size, _pack_counts, _store_counts),
    LoadKind("bias", lambda sizes: 3 * BIAS_WIDTH, _pack_bias, _store_bias),
    LoadKind("tokens", lambda sizes: sizes.num_tokens, _pack_tokens, _store_tokens),
    LoadKind("mask", lambda sizes: mask_words(sizes.vocab_size), _pack_mask, _store_mask),
)


@dataclasses.dataclass(frozen=True)
class LoadLayout:
    """Vector of a kind's program: the number n of rows to load, then N lines of a row and its payload, n of them in use."""

    kind: LoadKind
    num_rows: int  # R
    payload: int  # i32 values of a row's payload

    @property
    def line(self) -> int:
        return 1 + self.payload

    @property
    def capacity(self) -> int:
        """N, the most rows of a dispatch."""
        return max(1, min(self.num_rows, _VECTOR_SIZE // self.line))

    @property
    def size(self) -> int:
        return 1 + self.capacity * self.line

    def pack(self, loads: Iterable[RowLoad]) -> Iterator[np.ndarray]:
        """Yield vectors, i32[size] each, that load this kind of state of the rows; none if no row needs it."""
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
        """Return a vector that loads nothing."""
        return np.zeros(self.size, np.int32)

    def run(self, state: DeviceState, vector: Int[Array, " size"], *, axis: MeshAxis) -> DeviceState:
        """Load the vector's rows: the body of the program. `axis` shards the vocabulary."""
        lines = vector[1:].reshape(self.capacity, self.line)
        store = self.kind.store
        return lax.fori_loop(0, vector[0], lambda i, state: store(state, lines[i, 0], lines[i, 1:], axis), state)


def pack_loads(layouts: Sequence[LoadLayout], loads: Sequence[RowLoad]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the programs that load these rows, with their vectors: one of each kind that is needed, or several where the
    rows do not fit one vector."""
    for layout in layouts if loads else ():
        for vector in layout.pack(loads):
            yield layout.kind.program, vector
