"""What a running row keeps on the device between steps, and the small programs that load its uncommon parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sgl_jax.parallel.grid import ONE_DEVICE, MeshAxis
from sgl_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, Request
from sgl_jax.runtime.layout import StepInputs

MAX_EOS_TOKENS = 16
BIAS_WIDTH = MAX_LOGIT_BIAS + MAX_STOP_TOKENS + MAX_EOS_TOKENS
IN_PROMPT = 1 << 30  # bit of a token count: the token occurs in the prompt
_FOREVER = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """R rows and a spare one, the last, which padding reads and writes."""

    last_token: jax.Array  # i32[R + 1]
    page_table: jax.Array  # i32[R + 1, pages]
    token_counts: jax.Array  # i32[R + 1, V]: times in the output, plus IN_PROMPT; kept for rows with penalties
    bias_ids: jax.Array  # i32[R + 1, W]: tokens whose logit changes, for rows with Flag.BIAS
    bias_values: jax.Array  # f32[R + 1, W]
    bias_until: jax.Array  # i32[R + 1, W]: in force while the sampled position is below


_WHOLE: Any = ()  # on every device
_OVER_VOCAB: Any = (None, "vocab")
STATE_AXES = DeviceState(_WHOLE, _WHOLE, _OVER_VOCAB, _WHOLE, _WHOLE, _WHOLE)  # logical axes


def initial_state(num_rows: int, pages_per_row: int, vocab_size: int) -> DeviceState:
    n = num_rows + 1
    return DeviceState(
        last_token=jnp.zeros(n, jnp.int32),
        page_table=jnp.zeros((n, pages_per_row), jnp.int32),
        token_counts=jnp.zeros((n, vocab_size), jnp.int32),
        bias_ids=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
        bias_values=jnp.zeros((n, BIAS_WIDTH), jnp.float32),
        bias_until=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
    )


def state_bytes(num_rows: int, pages_per_row: int, vocab_size: int) -> int:
    shapes = jax.eval_shape(lambda: initial_state(num_rows, pages_per_row, vocab_size))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def apply_page_updates(state: DeviceState, inputs: StepInputs) -> DeviceState:
    row, index, page = inputs.page_updates
    return dataclasses.replace(state, page_table=state.page_table.at[row, index].set(page))


def store_samples(
    state: DeviceState, inputs: StepInputs, tokens: Int[Array, " S"], counted: jax.Array, axis: MeshAxis = ONE_DEVICE
) -> DeviceState:
    """Remember the sampled tokens; `counted` bool[S]: rows that also count them."""
    rows = inputs.rows
    places, _ = axis.mine(tokens, state.token_counts.shape[-1])
    last = jnp.where(inputs.samples, tokens, state.last_token[rows])
    return dataclasses.replace(
        state,
        last_token=state.last_token.at[rows].set(last),
        token_counts=state.token_counts.at[rows, places].add((counted & inputs.samples).astype(jnp.int32), mode="drop"),
    )


# Each loader takes one i32 vector: the row, then the payload.


def load_pages(state: DeviceState, vector: Int[Array, " n"]) -> DeviceState:
    return dataclasses.replace(state, page_table=state.page_table.at[vector[0]].set(vector[1:]))


def load_counts(state: DeviceState, vector: Int[Array, " n"], axis: MeshAxis = ONE_DEVICE) -> DeviceState:
    share = state.token_counts.shape[-1]
    counts = jax.lax.dynamic_slice_in_dim(vector, 1 + axis.index() * share, share)
    return dataclasses.replace(state, token_counts=state.token_counts.at[vector[0]].set(counts))


def load_bias(state: DeviceState, vector: Int[Array, " n"]) -> DeviceState:
    ids, bits, until = vector[1:].reshape(3, BIAS_WIDTH)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return dataclasses.replace(
        state,
        bias_ids=state.bias_ids.at[vector[0]].set(ids),
        bias_values=state.bias_values.at[vector[0]].set(values),
        bias_until=state.bias_until.at[vector[0]].set(until),
    )


LOADERS = ("pages", "counts", "bias")


def loaders(axis: MeshAxis) -> dict[str, Callable[[DeviceState, jax.Array], DeviceState]]:
    return {"pages": load_pages, "counts": functools.partial(load_counts, axis=axis), "bias": load_bias}


def loader_size(name: str, pages_per_row: int, vocab_size: int) -> int:
    """Length of the loader's vector."""
    return 1 + {"pages": pages_per_row, "counts": vocab_size, "bias": 3 * BIAS_WIDTH}[name]


def pack_pages(row: int, pages: np.ndarray, pages_per_row: int) -> np.ndarray:
    vector = np.zeros(1 + pages_per_row, np.int32)
    vector[0] = row
    vector[1 : 1 + len(pages)] = pages
    return vector


def pack_counts(row: int, request: Request, vocab_size: int) -> np.ndarray:
    vector = np.zeros(1 + vocab_size, np.int32)
    vector[0] = row
    counts = vector[1:]
    np.add.at(counts, request.tokens[len(request.prompt) :], 1)
    counts[request.prompt] |= IN_PROMPT
    return vector


def pack_bias(row: int, request: Request) -> np.ndarray:
    """logit_bias as given, and the stop tokens at -inf until min_tokens are out."""
    p = request.params
    vector = np.zeros(1 + 3 * BIAS_WIDTH, np.int32)
    vector[0] = row
    ids, bits, until = vector[1:].reshape(3, BIAS_WIDTH)
    n = len(p.logit_bias)
    ids[:n] = list(p.logit_bias)
    bits[:n] = np.array(list(p.logit_bias.values()), np.float32).view(np.int32)
    until[:n] = _FOREVER
    stops = request.stop_token_ids
    end = n + len(stops)
    ids[n:end] = stops
    bits[n:end] = np.full(len(stops), -np.inf, np.float32).view(np.int32)
    until[n:end] = min(len(request.prompt) + p.min_tokens, _FOREVER)
    return vector
