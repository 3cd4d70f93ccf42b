"""Verification of drafts inside the step, for rows of width W.

A decoding row has W tokens: its last one and W - 1 drafts of those that follow, some of which may be missing. A token is
sampled after each of the others, with the seed and position that it would have without drafts. Drafts are accepted up to the
first that differs from the token sampled in its place, so the output is the same as with W = 1. With W = 1 there are no
drafts, and this is the plain step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import RaggedBatch
from sgl_jax.runtime.device_state import NO_DRAFT, DeviceState
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.sampler import SampleLines, has_flag, uniforms
from sgl_jax.runtime.step_spec import Pools
from sgl_jax.step_plan import RowFlag


@dataclasses.dataclass(frozen=True)
class RowTokens:
    """Tokens of this step, with those that only the device knows."""

    start: jax.Array  # i32[M * S]: position of the row's first token
    drafts: jax.Array  # i32[M * S, W - 1], or NO_DRAFT
    packed: jax.Array  # i32[M * T]: all tokens in the plan's order
    num_missing: jax.Array  # i32[M * S]: drafts that a decoding row lacks, the last of its W tokens
    missing: jax.Array  # bool[M * T]: in the place of such a draft


def row_tokens(inputs: StepInputs, state: DeviceState, layout: PlanLayout) -> RowTokens:
    """Fill in the starts, last tokens and drafts of decoding rows, which come first in their rank, with W tokens each."""
    m, s, w = layout.num_ranks, layout.bucket.num_rows, layout.bucket.width
    decodes, rows = inputs.from_device, inputs.rows
    start = jnp.where(decodes, state.length[rows], inputs.start)
    drafted = decodes & ~has_flag(inputs.params, RowFlag.NO_DRAFTS)
    drafts = jnp.where(drafted[:, None], state.draft[rows, : w - 1], NO_DRAFT)
    known = jnp.concatenate([state.last_token[rows][:, None], jnp.maximum(drafts, 0)], axis=1)
    planned = inputs.tokens.reshape(m, -1)
    first = jnp.where(decodes[:, None], known, planned[:, : s * w].reshape(-1, w))
    packed = jnp.concatenate([first.reshape(m, s * w), planned[:, s * w :]], axis=1).reshape(-1)
    lacks = jnp.pad(decodes[:, None] & (drafts == NO_DRAFT), ((0, 0), (1, 0))).reshape(m, s * w)
    missing = jnp.pad(lacks, ((0, 0), (0, planned.shape[1] - s * w))).reshape(-1)
    return RowTokens(start, drafts, packed, lacks.reshape(-1, w).sum(1, dtype=jnp.int32), missing)


def sampled_tokens(batch: RaggedBatch, decodes: Bool[Array, " S"], width: int) -> Int[Array, " SW"]:
    """Return the indices of the packed tokens after which tokens are sampled, W for each row of a rank: all tokens of a
    decoding row, the last token of another row W times."""
    first, last = batch.cu_q_lens[:-1], jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    if width == 1:
        return last
    each = first[:, None] + jnp.arange(width)
    return jnp.where(decodes[:, None], each, last[:, None]).reshape(-1)


def sample_lines(inputs: StepInputs, tokens: RowTokens, width: int) -> SampleLines:
    """Return the lines of the sampler, W for each row, of which those after the last token and after each draft sample. In a row
    that does not decode only the first line does."""
    at = jnp.arange(width)
    end = jnp.where(inputs.from_device, tokens.start + 1, tokens.start + inputs.num_new)
    num_samples = jnp.where(inputs.samples, 1 + (tokens.drafts != NO_DRAFT).sum(1), 0)
    before = at[None, :, None] > jnp.arange(width - 1)  # [1, W, W - 1]: drafts before each line
    drafts = jnp.where(before, tokens.drafts[:, None], NO_DRAFT)
    return SampleLines(
        rows=jnp.repeat(inputs.rows, width),
        position=(end[:, None] + at).reshape(-1),
        samples=(at < num_samples[:, None]).reshape(-1),
        params=jnp.repeat(inputs.params, width, axis=0),
        drafts=drafts.reshape(len(inputs.rows) * width, width - 1),
    )


def simulated(tokens: Int[Array, "S W"], drafts: Int[Array, "S K"], lines: SampleLines, share: float) -> jax.Array:
    """Return the tokens that would have been sampled if each draft held with that probability, i32[S, W]."""
    holds = (uniforms(lines).reshape(tokens.shape)[:, :-1] < share) & (drafts != NO_DRAFT)
    others = jnp.where(tokens[:, :-1] == drafts, jnp.abs(drafts - 1), tokens[:, :-1])
    return jnp.concatenate([jnp.where(holds, drafts, others), tokens[:, -1:]], axis=1)


def count_accepted(sampled: Int[Array, "S W"], drafts: Int[Array, "S W-1"]) -> Int[Array, " S"]:
    """Count the sampled tokens that continue each row's sequence: all up to and including the first that differs from its
    draft. 1 without drafts."""
    holds = (sampled[:, :-1] == drafts).astype(jnp.int32)
    return 1 + jnp.cumprod(holds, axis=1).sum(1)


@dataclasses.dataclass(frozen=True)
class Verified:
    """A step whose drafts are verified, for its drafter. Rows and tokens are those of all M ranks, batch and hidden states
    those of the device's own."""

    weights: Weights[jax.Array]
    pools: Pools
    before: DeviceState
    state: DeviceState  # with the accepted tokens
    inputs: StepInputs
    row_tokens: RowTokens
    batch: RaggedBatch
    valid: jax.Array  # bool[M * T]
    hidden: jax.Array  # [T, D]: output of the last layer
    tapped: list[jax.Array]  # [T, D] each: inputs of the target_layers
    tokens: jax.Array  # i32[M * S, W]: sampled
    num_accepted: jax.Array  # i32[M * S]


def with_drafts(state: DeviceState, rows: Int[Array, " S"], drafts: Int[Array, "S K"] | int = NO_DRAFT) -> DeviceState:
    """Store the drafts of each row."""
    return dataclasses.replace(state, draft=state.draft.at[rows].set(drafts))
