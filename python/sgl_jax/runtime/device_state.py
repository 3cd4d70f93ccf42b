"""State that a running row keeps on the device between steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sgl_jax.parallel.grid import ONE_DEVICE, MeshAxis
from sgl_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS

MAX_EOS_TOKENS = 16
BIAS_WIDTH = MAX_LOGIT_BIAS + MAX_STOP_TOKENS + MAX_EOS_TOKENS
IN_PROMPT = 1 << 30  # bit of a token count: the token occurs in the prompt
NO_DRAFT = -1  # a draft that no sampled token equals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """R rows and a spare one, the last, which padding reads and writes. B = BIAS_WIDTH; W is that of the widest bucket."""

    length: jax.Array  # i32[R + 1]: tokens whose KV is final; where the row's next step starts, if it decodes
    last_token: jax.Array  # i32[R + 1]: the one after them, sampled last
    draft: jax.Array  # i32[R + 1, max(W - 1, 1)]: guesses at those that follow; NO_DRAFT where there is none
    page_table: jax.Array  # i32[R + 1, pages]
    token_counts: jax.Array  # i32[R + 1, V]: times in the output, plus IN_PROMPT; kept for rows with penalties
    bias_ids: jax.Array  # i32[R + 1, B]: tokens whose logit changes, for rows with Flag.BIAS
    bias_values: jax.Array  # f32[R + 1, B]
    bias_until: jax.Array  # i32[R + 1, B]: in force while the sampled position is below


_WHOLE: Any = ()  # on every device
_OVER_VOCAB: Any = (None, "vocab")
STATE_AXES = dataclasses.replace(  # logical axes of each array
    DeviceState(*[_WHOLE] * len(dataclasses.fields(DeviceState))), token_counts=_OVER_VOCAB
)


def initial_state(num_rows: int, pages_per_row: int, vocab_size: int, width: int = 1) -> DeviceState:
    n = num_rows + 1
    return DeviceState(
        length=jnp.zeros(n, jnp.int32),
        last_token=jnp.zeros(n, jnp.int32),
        # One column at least: jaxlib 0.11.2 crashes compiling a program that is given an empty array on several devices.
        draft=jnp.full((n, max(width - 1, 1)), NO_DRAFT, jnp.int32),
        page_table=jnp.zeros((n, pages_per_row), jnp.int32),
        token_counts=jnp.zeros((n, vocab_size), jnp.int32),
        bias_ids=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
        bias_values=jnp.zeros((n, BIAS_WIDTH), jnp.float32),
        bias_until=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
    )


def state_bytes(num_rows: int, pages_per_row: int, vocab_size: int, width: int = 1) -> int:
    shapes = jax.eval_shape(lambda: initial_state(num_rows, pages_per_row, vocab_size, width))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def apply_page_updates(state: DeviceState, updates: Int[Array, "3 U"]) -> DeviceState:
    """Write (row, index, page) into the page tables."""
    row, index, page = updates
    return dataclasses.replace(state, page_table=state.page_table.at[row, index].set(page))


def store_samples(
    state: DeviceState,
    rows: Int[Array, " S"],
    length: Int[Array, " S"],
    tokens: Int[Array, "S W"],
    num_accepted: Int[Array, " S"],
    samples: Bool[Array, " S"],
    counted: Bool[Array, " S"],
    axis: MeshAxis = ONE_DEVICE,
) -> DeviceState:
    """Remember where each row stands: its length, and where it samples the last of its accepted tokens. The tokens of
    `counted` rows are added to their counts."""
    accepted = jnp.arange(tokens.shape[1]) < num_accepted[:, None]
    places, _ = axis.mine(tokens, state.token_counts.shape[-1])
    added = (accepted & (counted & samples)[:, None]).astype(jnp.int32)
    last = jnp.take_along_axis(tokens, num_accepted[:, None] - 1, axis=1)[:, 0]
    return dataclasses.replace(
        state,
        length=state.length.at[rows].set(length),
        last_token=state.last_token.at[rows].set(jnp.where(samples, last, state.last_token[rows])),
        token_counts=state.token_counts.at[rows[:, None], places].add(added, mode="drop"),
    )
