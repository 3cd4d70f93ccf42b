"""Drafters: functions that end a step program by guessing the tokens after each row's last one.

A drafter takes what the step has verified and returns the pools and the state with new drafts, K = W - 1 in each row. A step of
width 1 makes none, since the next step of that width could not verify them; it only keeps what later drafts need.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.models import draft_model
from sgl_jax.ops.attention.api import make_ragged_batch
from sgl_jax.runtime.device_state import NO_DRAFT, DeviceState
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.sampler import best_token
from sgl_jax.runtime.speculate import Verified, with_drafts
from sgl_jax.runtime.step_spec import Pools, StepSpec

# --- n-grams -------------------------------------------------------------------------------------------------------------


def by_ngram(
    after: Verified, spec: StepSpec, layout: PlanLayout, *, min_ngram: int, max_ngram: int
) -> tuple[Pools, DeviceState]:
    """Draft the tokens that followed the last earlier occurrence of the row's end, as long a one as there is, within the row's
    own tokens (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding)."""
    rows, width = after.inputs.rows, layout.bucket.width
    at = jnp.where(after.inputs.samples, after.state.length[rows] - after.num_accepted + 1, after.state.tokens.shape[1])
    taken = jnp.arange(width) < after.num_accepted[:, None]
    at = jnp.where(taken, at[:, None] + jnp.arange(width), after.state.tokens.shape[1])
    history = after.state.tokens.at[rows[:, None], at].set(after.tokens, mode="drop")
    state = dataclasses.replace(after.state, tokens=history)
    if width == 1:
        return after.pools, with_drafts(state, rows)
    limited = spec.kernels.library is not None  # each draft takes time there, and few behind a short match are right
    drafts = ngram_drafts(history[rows], state.length[rows] + 1, width - 1, min_ngram, max_ngram, limited=limited)
    return after.pools, with_drafts(state, rows, jnp.where(after.inputs.samples[:, None], drafts, NO_DRAFT))


def ngram_drafts(
    tokens: Int[Array, "S C"],
    num_tokens: Int[Array, " S"],
    num_drafts: int,
    min_ngram: int,
    max_ngram: int,
    *,
    limited: bool = False,
) -> Int[Array, "S K"]:
    """Return for each row, of whose `tokens` the first num_tokens count, the num_drafts tokens after the latest of the longest
    earlier matches of its end; NO_DRAFT if none of min_ngram tokens is there. A match that reaches into the end is a period,
    which goes on. If `limited`, drafts are at most one token longer than their match."""
    index = jnp.arange(tokens.shape[1])
    length, matches = jnp.zeros_like(tokens), jnp.ones(tokens.shape, bool)
    for back in range(max_ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(num_tokens - 1 - back, 0)[:, None], axis=1)
        matches &= (jnp.roll(tokens, back, axis=1) == last) & (index >= back)
        length += matches
    earlier = index < (num_tokens - 1)[:, None]
    score = jnp.where(earlier & (length >= min_ngram), length * tokens.shape[1] + index, -1)
    end = jnp.argmax(score, axis=1)[:, None]  # last token of the match
    period = jnp.maximum(num_tokens[:, None] - 1 - end, 1)
    drafts = jnp.take_along_axis(tokens, end + 1 + jnp.arange(num_drafts) % period, axis=1, mode="clip")
    best = score.max(1, keepdims=True)
    counts = jnp.arange(num_drafts) <= best // tokens.shape[1] if limited else True
    return jnp.where((best >= 0) & counts, drafts, NO_DRAFT)


# --- draft models --------------------------------------------------------------------------------------------------------


def by_model(after: Verified, spec: StepSpec, layout: PlanLayout) -> tuple[Pools, DeviceState]:
    """Run the draft model over the step's tokens, and then K times over one token of each row: the last one, then each draft.

    Its KV of a token depends on that token and those before it, as the target's does, so its pages are shared with the
    target's. At the start of a row behind a cached prefix the feature is zero: the pool keeps none.
    """
    grid = dataclasses.replace(spec.grid, sequence=False)  # the same shards, and fewer collectives
    spec, rows, state = dataclasses.replace(spec, grid=grid), after.inputs.rows, after.state
    pool, feature = _over_tokens(after, spec, layout.bucket.width)
    if feature is not None:
        state = dataclasses.replace(state, feature=state.feature.at[rows].set(grid.data_axis.gather(feature)))
    if layout.bucket.width == 1:
        return [*after.pools[:-1], pool], with_drafts(state, rows)
    pool, drafts = _one_by_one(after, spec, layout, pool, feature)
    drafts = jnp.pad(drafts, ((0, 0), (0, state.draft.shape[1] - drafts.shape[1])), constant_values=NO_DRAFT)
    drafts = jnp.where(after.inputs.samples[:, None], drafts, NO_DRAFT)
    return [*after.pools[:-1], pool], with_drafts(state, rows, drafts)


def _pass(after: Verified, spec: StepSpec) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], int]:
    """Return the forward pass of the draft model with its weights, and the first key that its attention sees."""
    draft, _ = draft_model.parts(after.weights, spec.config)
    first_layer = (
        spec.config.num_layers if len(after.pools) == 1 else 0
    )  # behind the target's in its pool, or in its own
    forward = functools.partial(draft_model.forward, after.weights, spec.config, first_layer=first_layer)
    return forward, 0 if draft.kind == "standalone" else 1


def _over_tokens(after: Verified, spec: StepSpec, width: int) -> tuple[jax.Array, Float[Array, "S D"] | None]:
    """Write the KV of the step's tokens. Return the pool, and the feature of each row's last final token."""
    (forward, first_key), ranks, inputs = _pass(after, spec), spec.grid.data_axis, after.inputs
    draft, _ = draft_model.parts(after.weights, spec.config)
    feature = at_end = None
    if draft.kind != "standalone":
        of_each = draft_model.features(after.weights, spec.config, after.hidden, after.tapped, spec.linear())
        feature = _shifted(of_each, after, ranks.own(_before(after)))
        num_final = ranks.own(jnp.where(inputs.from_device, after.num_accepted, inputs.num_new))
        at_end = of_each[jnp.maximum(after.batch.cu_q_lens[:-1] + num_final - 1, 0)]
    context = spec.context(draft.decoder, after.batch, after.valid, width, first_key)
    _, pool = forward(after.row_tokens.packed, feature, after.pools[-1], context)
    return pool, at_end


def _one_by_one(
    after: Verified, spec: StepSpec, layout: PlanLayout, pool: jax.Array, feature: Float[Array, "S D"] | None
) -> tuple[jax.Array, Int[Array, "MS K"]]:
    """Draft K tokens of each row. All rows take part, so that each has one token; those whose drafts are not used write to slots
    that are written again before they are read."""
    (forward, first_key), rows = _pass(after, spec), after.inputs.rows
    draft, weights = draft_model.parts(after.weights, spec.config)
    own_rows = spec.grid.data_axis.own(rows)
    pages, length = after.state.page_table[own_rows], after.state.length[own_rows]
    ones, number = jnp.ones(len(own_rows), jnp.int32), jnp.int32(len(own_rows))
    linear = spec.linear(after.inputs.samples)

    def one_token(carry, ahead):
        pool, tokens, feature = carry
        batch = make_ragged_batch(pages, length + ahead, ones, number, len(own_rows), layout.page_size)
        context = spec.context(draft.decoder, batch, jnp.ones(len(rows), bool), 1, first_key)
        hidden, pool = forward(tokens, feature, pool, context)
        scores = draft_model.logits(after.weights, spec.config, spec.grid.data_axis.gather(hidden), linear)
        tokens = best_token(scores, spec.grid.all_axes, weights.d2t)
        feature = None if feature is None else draft_model.recycled(after.weights, spec.config, hidden)
        return (pool, tokens, feature), tokens

    start = pool, after.state.last_token[rows], feature
    (pool, *_), drafts = lax.scan(one_token, start, jnp.arange(layout.bucket.width - 1))
    return pool, drafts.T


def _before(after: Verified) -> Float[Array, "MS D"]:
    """Return the feature of the token before each row's first one of this step; zeros where the last step of the row, if it had
    one, ended elsewhere."""
    rows, before = after.inputs.rows, after.before
    follows = before.length[rows] == after.row_tokens.start
    return jnp.where(follows[:, None], before.feature[rows], 0)


def _shifted(of_each: Float[Array, "T D"], after: Verified, before: Float[Array, "S D"]) -> Float[Array, "T D"]:
    """Return the feature of the token before each packed token."""
    batch = after.batch
    is_first: Bool[Array, " T"] = jnp.arange(len(of_each)) == batch.cu_q_lens[batch.token_row]
    return jnp.where(is_first[:, None], before[batch.token_row].astype(of_each.dtype), jnp.roll(of_each, 1, axis=0))
