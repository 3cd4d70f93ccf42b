"""Body of the step program, from a plan vector to sampled tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sgl_jax.models import decoder
from sgl_jax.models.adapters import Adapters
from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import RaggedBatch
from sgl_jax.request import MAX_LOGPROBS
from sgl_jax.runtime import sampler, speculate
from sgl_jax.runtime.device_state import NO_DRAFT, DeviceState, store_samples
from sgl_jax.runtime.forward import forward
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.speculate import Verified
from sgl_jax.runtime.step_spec import Pools, StepSpec
from sgl_jax.step_plan import RowFlag


class StepOutputs(NamedTuple):
    """Results for the rows and tokens of all M ranks, padding included, replicated on every device."""

    tokens: jax.Array  # i32[M * S, W]
    counts: jax.Array  # i32[M * S, 2]: num_accepted and num_drafted of StepTokens
    logprobs: Logprobs  # [M * S * W], of the sampled tokens
    prompt_logprobs: Logprobs  # [M * T], of the token after each packed token


def step(
    weights: Weights[jax.Array],
    adapters: Adapters[jax.Array] | None,
    pools: Pools,
    state: DeviceState,
    vector: Int[Array, " size"],
    *,
    spec: StepSpec,
    layout: PlanLayout,
) -> tuple[Pools, DeviceState, StepOutputs]:
    """Run one plan: compute its tokens, then logits, sample, store, draft. The sampler takes the tokens of all ranks."""
    ranks, everyone, bucket = spec.grid.data_axis, spec.grid.all_axes, layout.bucket
    library = spec.kernels.library
    pools, state, inputs, rows, batch, valid, hidden, tapped = forward(
        weights, adapters, pools, state, vector, spec, layout
    )
    sampled_at = speculate.sampled_tokens(batch, ranks.own(inputs.from_device), bucket.width)
    last_hidden = ranks.gather(hidden[sampled_at])  # [M * S * W, D]
    lines = speculate.sample_lines(inputs, rows, bucket.width)
    logits = decoder.logits(weights, spec.config, last_hidden, spec.linear(lines.samples))
    with jax.named_scope("sample"):
        sampled = sampler.sample(logits, lines, state, everyone, library)
        wanted = sampler.has_flag(lines.params, RowFlag.LOGPROBS)
        logprobs = sampler.token_logprobs(logits, sampled, (wanted & lines.samples).any(), everyone, library)
    with jax.named_scope("store"):
        tokens = sampled.reshape(-1, bucket.width)
        if spec.simulated_acceptance is not None:
            tokens = speculate.simulated(tokens, rows.drafts, lines, spec.simulated_acceptance)
        num_accepted = speculate.count_accepted(tokens, rows.drafts)
        counts = jnp.stack([num_accepted, (rows.drafts != NO_DRAFT).sum(1)], axis=1)
        length = rows.start + jnp.where(inputs.from_device, num_accepted, inputs.num_new)
        counted = sampler.has_flag(inputs.params, RowFlag.PENALTIES)
        before = state
        state = store_samples(state, inputs.rows, length, tokens, num_accepted, inputs.samples, counted, everyone)
    if spec.drafter is not None:
        verified = Verified(
            weights, pools, before, state, inputs, rows, batch, valid, hidden, tapped, tokens, num_accepted
        )
        with jax.named_scope("draft"):
            pools, state = spec.drafter(verified, spec, layout)
    with jax.named_scope("prompt_logprobs"):
        prompt_logprobs = _prompt_logprobs(weights, spec, inputs, batch, rows.packed, hidden)
    return pools, state, StepOutputs(tokens, counts, logprobs, prompt_logprobs)


def _prompt_logprobs(
    weights: Weights[jax.Array],
    spec: StepSpec,
    inputs: StepInputs,
    batch: RaggedBatch,
    tokens: Int[Array, " MT"],
    hidden: Float[Array, "T D"],
) -> Logprobs:
    """Score the prompt token that follows each packed token, [M * T], M * S at a time; zeros unless a row asked."""
    ranks, everyone = spec.grid.data_axis, spec.grid.all_axes
    num_tokens, num_rows = len(tokens), len(inputs.rows)
    wanted = sampler.has_flag(inputs.params, RowFlag.PROMPT_LOGPROBS) & (inputs.num_new > 0)

    def compute() -> Logprobs:
        is_last = jnp.arange(len(hidden)) == batch.cu_q_lens[1:][batch.token_row] - 1
        next_token = ranks.own(inputs.next_token)[batch.token_row]
        following = ranks.gather(jnp.where(is_last, next_token, jnp.roll(ranks.own(tokens), -1)))
        pad = -num_tokens % num_rows
        blocks = jnp.pad(ranks.gather(hidden), ((0, pad), (0, 0))).reshape(-1, num_rows, hidden.shape[-1])
        targets = jnp.pad(jnp.maximum(following, 0), (0, pad)).reshape(-1, num_rows)

        def one(block):
            logits = decoder.logits(weights, spec.config, block[0], spec.linear())
            return sampler.token_logprobs(logits, block[1], jnp.bool_(True), everyone, spec.kernels.library)

        chosen, ids, values = lax.map(one, (blocks, targets))
        flat = chosen.reshape(-1), ids.reshape(-1, MAX_LOGPROBS), values.reshape(-1, MAX_LOGPROBS)
        return Logprobs(*(x[:num_tokens] for x in flat))

    return lax.cond(wanted.any(), compute, lambda: sampler.no_logprobs(num_tokens))
