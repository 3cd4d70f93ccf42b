"""The step: one compiled program from a plan vector to sampled tokens. KV pool and device state are donated."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models import decoder
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import RaggedBatch, make_ragged_batch, split_heads
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.grid import LONE, Grid
from sgl_jax.request import MAX_LOGPROBS
from sgl_jax.runtime import sampler
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.state import DeviceState, apply_page_updates, store_samples
from sgl_jax.step_plan import Flag


class StepOutputs(NamedTuple):
    """Of the rows and tokens of all M ranks, padding included, on every device."""

    tokens: jax.Array  # i32[M * S]
    logprobs: Logprobs  # of the sampled tokens, [M * S]
    prompt_logprobs: Logprobs  # of the token after each packed token, [M * T]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What makes a step program, besides its bucket."""

    config: DecoderConfig  # one device's share of it
    kernels: Kernels
    pages_per_layer: int  # P, of a rank
    compute_dtype: str
    grid: Grid = LONE


def step(
    weights: Weights[jax.Array],
    kv: Float[Array, "LP K planes page H"],
    state: DeviceState,
    vector: Int[Array, " size"],
    *,
    spec: StepSpec,
    layout: PlanLayout,
) -> tuple[Float[Array, "LP K planes page H"], DeviceState, StepOutputs]:
    """Run one plan: update page tables, embed, layers, logits of each row's last token, sample, remember.

    Every device knows the whole plan. Attention is its rank's; MLPs and the sampler take what all ranks have.
    """
    ranks, everyone, bucket = spec.grid.data_axis, spec.grid.all_axes, layout.bucket
    # Scopes name the stages in a profile (docs/features/profiling.md).
    with jax.named_scope("unpack"):
        inputs = layout.unpack(vector)
        state = apply_page_updates(state, inputs)
        batch = make_ragged_batch(
            state.page_table[ranks.own(inputs.rows)],
            ranks.own(inputs.start),
            ranks.own(inputs.num_new),
            ranks.own(inputs.num_short)[0],
            bucket.num_tokens,
            layout.page_size,
        )
        tokens = _tokens(inputs, state, layout)
        used = inputs.num_new.reshape(layout.num_ranks, -1).sum(-1, keepdims=True)
        valid = (jnp.arange(bucket.num_tokens) < used).reshape(-1)

    latent = {"value_dim": spec.config.value_dim} if spec.config.mla else {}  # not all backends know it

    def attend(q, k, v, kv, *, layer, window, sinks, prepare=None):
        if k is None and not spec.kernels.attention.joined:
            q, k, v = split_heads(q, spec.config.num_kv_heads)
        return spec.kernels.attention(
            q,
            k,
            v,
            kv,
            batch,
            first_page=layer * spec.pages_per_layer,
            scale=spec.config.scale,
            window=window,
            softcap=spec.config.attn_logit_softcap,
            sinks=sinks,
            prepare=prepare,
            temperature_length=spec.config.attn_temperature_length,
            **latent,
        )

    context = decoder.Context(
        batch.positions, valid, attend, spec.kernels.grouped_matmul, spec.compute_dtype, spec.grid
    )
    hidden, kv = decoder.hidden_states(weights, spec.config, tokens, kv, context)
    last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    logits = decoder.logits(weights, spec.config, ranks.gather(hidden[last]))
    with jax.named_scope("sample"):
        sampled = sampler.sample(logits, inputs, state, everyone)
        wanted = sampler.has_flag(inputs, Flag.LOGPROBS)
        logprobs = sampler.token_logprobs(logits, sampled, (wanted & inputs.samples).any(), everyone)
    with jax.named_scope("store"):
        state = store_samples(state, inputs, sampled, sampler.has_flag(inputs, Flag.PENALTIES), everyone)
    with jax.named_scope("prompt_logprobs"):
        prompt_logprobs = _prompt_logprobs(weights, spec, inputs, batch, tokens, hidden)
    return kv, state, StepOutputs(sampled, logprobs, prompt_logprobs)


def _tokens(inputs: StepInputs, state: DeviceState, layout: PlanLayout) -> Int[Array, " MT"]:
    """All ranks' tokens. Rows that decode come first in their rank, a token each: the device knows it."""
    m, s = layout.num_ranks, layout.bucket.num_rows
    tokens = inputs.tokens.reshape(m, -1)
    sampled = jnp.where(inputs.from_device, state.last_token[inputs.rows], tokens[:, :s].reshape(-1))
    return jnp.concatenate([sampled.reshape(m, s), tokens[:, s:]], axis=1).reshape(-1)


def _prompt_logprobs(
    weights: Weights[jax.Array],
    spec: StepSpec,
    inputs: StepInputs,
    batch: RaggedBatch,
    tokens: Int[Array, " MT"],
    hidden: Float[Array, "T D"],
) -> Logprobs:
    """How likely the model found each next prompt token: [M * T], computed S at a time, and only if someone asked."""
    ranks, everyone = spec.grid.data_axis, spec.grid.all_axes
    num_tokens, num_rows = len(tokens), len(inputs.rows)
    wanted = sampler.has_flag(inputs, Flag.PROMPT_LOGPROBS) & (inputs.num_new > 0)

    def compute() -> Logprobs:
        is_last = jnp.arange(len(hidden)) == batch.cu_q_lens[1:][batch.token_row] - 1
        next_token = ranks.own(inputs.next_token)[batch.token_row]
        following = ranks.gather(jnp.where(is_last, next_token, jnp.roll(ranks.own(tokens), -1)))
        pad = -num_tokens % num_rows
        blocks = jnp.pad(ranks.gather(hidden), ((0, pad), (0, 0))).reshape(-1, num_rows, hidden.shape[-1])
        targets = jnp.pad(jnp.maximum(following, 0), (0, pad)).reshape(-1, num_rows)

        def one(block):
            logits = decoder.logits(weights, spec.config, block[0])
            return sampler.token_logprobs(logits, block[1], jnp.bool_(True), everyone)

        chosen, ids, values = lax.map(one, (blocks, targets))
        flat = chosen.reshape(-1), ids.reshape(-1, MAX_LOGPROBS), values.reshape(-1, MAX_LOGPROBS)
        return Logprobs(*(x[:num_tokens] for x in flat))

    return lax.cond(wanted.any(), compute, lambda: sampler.no_logprobs(num_tokens))
