"""Body of the step program of a launch that makes vectors: no logits, no sampling, no drafts."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sgl_jax.models.adapters import Adapters
from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import RaggedBatch
from sgl_jax.ops.norm_rope import rms_norm
from sgl_jax.runtime.device_state import DeviceState
from sgl_jax.runtime.forward import forward
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.step_spec import Pools, StepSpec
from sgl_jax.step_plan import StepPlan, StepTokens


class PooledOutputs(NamedTuple):
    """Results for the rows of all M ranks, padding included, replicated on every device."""

    # f32[M * S, D], after the final norm: the state of each row's last new token or, for the mean, the sum over its new ones.
    hidden: jax.Array


def pooling_step(
    weights: Weights[jax.Array],
    adapters: Adapters[jax.Array] | None,
    pools: Pools,
    state: DeviceState,
    vector: Int[Array, " size"],
    *,
    spec: StepSpec,
    layout: PlanLayout,
) -> tuple[Pools, DeviceState, PooledOutputs]:
    """Run one plan: compute its tokens and pool their states over each row."""
    computed = forward(weights, adapters, pools, state, vector, spec, layout)
    with jax.named_scope("pool"):
        pooled = _pooled(weights, spec, computed.batch, computed.hidden)
        pooled = spec.grid.data_axis.gather(pooled)
    return computed.pools, computed.state, PooledOutputs(pooled)


def _pooled(
    weights: Weights[jax.Array], spec: StepSpec, batch: RaggedBatch, hidden: Float[Array, "T D"]
) -> Float[Array, "S D"]:
    """Pool over the rows of the device's own rank, in float32."""
    config = spec.config

    def normed(x: jax.Array) -> jax.Array:
        return rms_norm(x, weights.final_norm, config.rms_norm_eps, config.norm_offset).astype(jnp.float32)

    ends = batch.cu_q_lens[1:]
    if config.pooling == "last":
        return normed(hidden[jnp.maximum(ends - 1, 0)])
    is_token = jnp.arange(len(hidden)) < ends[-1]
    states = jnp.where(is_token[:, None], normed(hidden), 0)
    return jax.ops.segment_sum(states, batch.token_row, len(ends), indices_are_sorted=True)


@dataclasses.dataclass(frozen=True)
class PoolingFlight:
    """Launched step of a launch that makes vectors, not collected."""

    plan: StepPlan
    outputs: PooledOutputs
    rows: np.ndarray | slice  # indices of the plan's rows in the padded outputs
    wants_all: bool  # sums of every chunk are wanted, not of the last ones alone

    def collect(self) -> StepTokens:
        """Wait for the step; copy the pooled states to the host if a prompt ends in it or all are wanted. The tokens
        are zeros, of which no request takes any."""
        num_rows = len(self.plan.rows)
        hidden = None
        if self.wants_all or self.plan.samples.any():
            hidden = np.asarray(self.outputs.hidden)[self.rows]
        else:
            self.outputs.hidden.block_until_ready()
        zeros, ones = np.zeros(num_rows, np.int32), np.ones(num_rows, np.int32)
        return StepTokens(zeros[:, None], ones, zeros, None, None, hidden)
