"""Rows of width W inside the step: which tokens they compute, where tokens are sampled, and which drafts hold.

A row that decodes computes its last token and W - 1 drafts of those that follow. A token is sampled after each of them,
with the seed and position it would have without drafts, and drafts are accepted as long as they equal what was sampled
there: output is the same as with W = 1. With W = 1 there are no drafts, and everything here is the plain step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.ops.attention.api import RaggedBatch
from sgl_jax.runtime.device_state import NO_DRAFT, DeviceState
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.sampler import SampleLines


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftInputs:
    """Inputs of a drafter: each row after its step."""

    hidden: jax.Array  # [S, D]: the last layer's output at the row's last accepted token
    last_token: jax.Array  # i32[S]: the token sampled after it
    length: jax.Array  # i32[S]: how many tokens come before last_token


# Guesses the W - 1 tokens after last_token, i32[S, W - 1]; NO_DRAFT where it has no guess.
type Drafter = Callable[[DraftInputs], jax.Array]


@dataclasses.dataclass(frozen=True)
class RowTokens:
    """Each row's tokens of this step as the device knows them."""

    start: jax.Array  # i32[M * S]: position of its first one
    drafts: jax.Array  # i32[M * S, W - 1]; NO_DRAFT where it has none
    packed: jax.Array  # i32[M * T]: all tokens in the plan's order


def row_tokens(inputs: StepInputs, state: DeviceState, layout: PlanLayout) -> RowTokens:
    """Fill in what only the device knows of rows that decode: where they stand, their last tokens and drafts.

    They come first in their rank, with W tokens each.
    """
    m, s, w = layout.num_ranks, layout.bucket.num_rows, layout.bucket.width
    decodes, rows = inputs.from_device, inputs.rows
    start = jnp.where(decodes, state.length[rows], inputs.start)
    drafts = jnp.where(decodes[:, None], state.draft[rows, : w - 1], NO_DRAFT)
    known = jnp.concatenate([state.last_token[rows][:, None], jnp.maximum(drafts, 0)], axis=1)
    planned = inputs.tokens.reshape(m, -1)
    first = jnp.where(decodes[:, None], known, planned[:, : s * w].reshape(-1, w))
    packed = jnp.concatenate([first.reshape(m, s * w), planned[:, s * w :]], axis=1).reshape(-1)
    return RowTokens(start, drafts, packed)


def sampled_tokens(batch: RaggedBatch, decodes: Bool[Array, " S"], width: int) -> Int[Array, " SW"]:
    """The packed tokens of a rank after which tokens are sampled, W for each row: each of its tokens where it decodes, else
    its last one W times."""
    first, last = batch.cu_q_lens[:-1], jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    if width == 1:
        return last
    each = first[:, None] + jnp.arange(width)
    return jnp.where(decodes[:, None], each, last[:, None]).reshape(-1)


def sample_lines(inputs: StepInputs, tokens: RowTokens, width: int) -> SampleLines:
    """The lines of the sampler, W for each row. Only the first counts where the row does not decode."""
    at = jnp.arange(width)
    decodes = inputs.from_device[:, None]
    end = jnp.where(inputs.from_device, tokens.start + 1, tokens.start + inputs.num_new)
    before = at[None, :, None] > jnp.arange(width - 1)  # [1, W, W - 1]: drafts before each line
    drafts = jnp.where(before, tokens.drafts[:, None], NO_DRAFT)
    return SampleLines(
        rows=jnp.repeat(inputs.rows, width),
        position=(end[:, None] + at).reshape(-1),
        samples=(inputs.samples[:, None] & (decodes | (at == 0))).reshape(-1),
        params=jnp.repeat(inputs.params, width, axis=0),
        drafts=drafts.reshape(len(inputs.rows) * width, width - 1),
    )


def count_accepted(sampled: Int[Array, "S W"], drafts: Int[Array, "S W-1"]) -> Int[Array, " S"]:
    """How many of a row's sampled tokens are the next ones of its sequence: those up to the first that differs from its
    draft, that one included. 1 where there are no drafts."""
    holds = (sampled[:, :-1] == drafts).astype(jnp.int32)
    return 1 + jnp.cumprod(holds, axis=1).sum(1)


def draft(
    state: DeviceState,
    rows: Int[Array, " S"],
    hidden: Float[Array, "SW D"],
    num_accepted: Int[Array, " S"],
    drafter: Drafter | None,
) -> DeviceState:
    """Remember new drafts of each row. `hidden` is that of the sampled lines, W for each row."""
    if drafter is None:
        return state
    lines = jnp.arange(len(rows)) * (len(hidden) // len(rows)) + num_accepted - 1
    drafts = drafter(DraftInputs(hidden[lines], state.last_token[rows], state.length[rows]))
    return dataclasses.replace(state, draft=state.draft.at[rows].set(drafts))
