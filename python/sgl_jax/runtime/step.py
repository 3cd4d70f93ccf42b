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
from sgl_jax.ops.attention.api import RaggedBatch, make_ragged_batch
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.tensor import ONE_DEVICE, TensorAxis
from sgl_jax.request import MAX_LOGPROBS
from sgl_jax.runtime import sampler
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.state import DeviceState, apply_page_updates, store_samples
from sgl_jax.step_plan import Flag


class StepOutputs(NamedTuple):
    tokens: jax.Array  # i32[S]
    logprobs: Logprobs  # of the sampled tokens, [S]
    prompt_logprobs: Logprobs  # of the token after each packed token, [T]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What makes a step program, besides its bucket."""

    config: DecoderConfig  # one device's share of it
    kernels: Kernels
    pages_per_layer: int  # P
    axis: TensorAxis = ONE_DEVICE


def step(
    weights: Weights,
    kv: Float[Array, "LP K planes page H"],
    state: DeviceState,
    vector: Int[Array, " size"],
    *,
    spec: StepSpec,
    layout: PlanLayout,
) -> tuple[Float[Array, "LP K planes page H"], DeviceState, StepOutputs]:
    """Run one plan: update page tables, embed, layers, logits of each row's last token, sample, remember."""
    # Scopes name the stages in a profile (docs/features/profiling.md).
    with jax.named_scope("unpack"):
        inputs = layout.unpack(vector)
        state = apply_page_updates(state, inputs)
        batch = make_ragged_batch(
            state.page_table[inputs.rows],
            inputs.start,
            inputs.num_new,
            inputs.num_single[0],
            layout.bucket.num_tokens,
            layout.page_size,
        )
        tokens = jnp.where(
            inputs.from_device[batch.token_row], state.last_token[inputs.rows][batch.token_row], inputs.tokens
        )

    latent = {"value_dim": spec.config.value_dim} if spec.config.mla else {}  # not all backends know it

    def attend(q, k, v, kv, *, layer, window, sinks, prepare=None):
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

    valid = jnp.arange(layout.bucket.num_tokens) < batch.cu_q_lens[-1]
    context = decoder.Context(batch.positions, valid, attend, spec.kernels.grouped_matmul, spec.axis)
    hidden, kv = decoder.hidden_states(weights, spec.config, tokens, kv, context)
    last = jnp.maximum(batch.cu_q_lens[1:] - 1, 0)
    logits = decoder.logits(weights, spec.config, hidden[last])
    with jax.named_scope("sample"):
        sampled = sampler.sample(logits, inputs, state, spec.axis)
        wanted = sampler.has_flag(inputs, Flag.LOGPROBS)
        logprobs = sampler.token_logprobs(logits, sampled, (wanted & inputs.samples).any(), spec.axis)
    with jax.named_scope("store"):
        state = store_samples(state, inputs, sampled, sampler.has_flag(inputs, Flag.PENALTIES), spec.axis)
    with jax.named_scope("prompt_logprobs"):
        prompt_logprobs = _prompt_logprobs(weights, spec, inputs, batch, tokens, hidden)
    return kv, state, StepOutputs(sampled, logprobs, prompt_logprobs)


def _prompt_logprobs(
    weights: Weights, spec: StepSpec, inputs: StepInputs, batch: RaggedBatch, tokens: jax.Array, hidden: jax.Array
) -> Logprobs:
    """How likely the model found each next prompt token: [T], computed S at a time, and only if someone asked."""
    num_tokens, num_rows = len(tokens), len(inputs.rows)
    is_last = jnp.arange(num_tokens) == batch.cu_q_lens[1:][batch.token_row] - 1
    following = jnp.where(is_last, inputs.next_token[batch.token_row], jnp.roll(tokens, -1))
    wanted = sampler.has_flag(inputs, Flag.PROMPT_LOGPROBS) & (inputs.num_new > 0)

    def compute() -> Logprobs:
        pad = -num_tokens % num_rows
        blocks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, num_rows, hidden.shape[-1])
        targets = jnp.pad(jnp.maximum(following, 0), (0, pad)).reshape(-1, num_rows)

        def one(block):
            logits = decoder.logits(weights, spec.config, block[0])
            return sampler.token_logprobs(logits, block[1], jnp.bool_(True), spec.axis)

        chosen, ids, values = lax.map(one, (blocks, targets))
        flat = chosen.reshape(-1), ids.reshape(-1, MAX_LOGPROBS), values.reshape(-1, MAX_LOGPROBS)
        return Logprobs(*(x[:num_tokens] for x in flat))

    return lax.cond(wanted.any(), compute, lambda: sampler.no_logprobs(num_tokens))
