"""Static parts of a step program, and the context in which its models run."""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool

from sgl_jax.models.adapters import AdapterRoom, SlotsInUse
from sgl_jax.models.decoder import Context
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.linear import Linear, products
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, RaggedBatch, split_heads
from sgl_jax.ops.kernels import Kernels
from sgl_jax.ops.norm_rope import PLAIN_NORMS
from sgl_jax.parallel.grid import LONE, Grid
from sgl_jax.runtime.device_state import DeviceState

type Pools = list[jax.Array]  # the target's KV, and that of a draft model whose KV has another shape
# Makes drafts of the tokens after each row's last one: (speculate.Verified, StepSpec, PlanLayout) -> values after the step.
type Drafter = Callable[..., tuple[Pools, DeviceState]]


_LONG_STEP = 1024  # tokens; in shorter ones XLA makes a norm part of the product behind it, or keeps it on the chip


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static parts of a step program, besides its bucket."""

    config: DecoderConfig  # one device's shard
    kernels: Kernels
    pages_per_layer: int  # P, in each rank
    compute_dtype: str
    grid: Grid = LONE
    drafter: Drafter | None = None
    adapters: AdapterRoom | None = None
    simulated_acceptance: float | None = None  # as in RunnerConfig

    def linear(self, live: Bool[Array, " T"] | None = None) -> Linear:
        """Return the product of tokens with a matrix, for T tokens of which the live ones count; None: for any."""
        return products(self.kernels.over(live))[0]

    def context(
        self,
        model: DecoderConfig,
        batch: RaggedBatch,
        valid: Bool[Array, " MT"],
        width: int,
        first_key: int = 0,
        slots: SlotsInUse | None = None,
    ) -> Context:
        """Return the context of a forward pass of the target or the draft model over the batch. `valid`: the tokens of all ranks
        that count. `slots`: the adapters of its tokens; a draft model has none."""
        attention = _attention_spec(model, width, first_key)

        def attend(q, k, v, kv, *, layer, window, sinks, kv_scales, prepare=None):
            if k is None and not self.kernels.attention.fused:
                q, k, v = split_heads(q, model.num_kv_heads)
            arrays = AttentionLayer(
                attention,
                layer * self.pages_per_layer,
                window=window,
                sinks=sinks,
                kv_scales=kv_scales,
                prepare=prepare,
            )
            return self.kernels.attention(q, k, v, kv, batch, arrays)

        live = valid if self.grid.data_axis.size == 1 else None  # else a product has its rank's tokens or those of all
        linear, grouped = products(self.kernels.over(live), slots)
        return Context(
            batch.positions,
            valid,
            attend,
            grouped,
            self.compute_dtype,
            self.grid,
            linear,
            gated=self.kernels.gated,
            routed=self.kernels.routed_experts,
            norms=self.kernels.norms if len(batch.positions) >= _LONG_STEP else PLAIN_NORMS,
        )


def _attention_spec(config: DecoderConfig, width: int, first_key: int) -> AttentionSpec:
    value_dim = config.value_dim if config.mla else None
    softcap, length = config.attn_logit_softcap, config.attn_temperature_length
    return AttentionSpec(config.scale, softcap, length, value_dim, width, first_key)
