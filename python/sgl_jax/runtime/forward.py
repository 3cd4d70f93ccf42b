"""First half of every step program, from a plan vector to the last layer's output."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from sgl_jax.models import decoder
from sgl_jax.models.adapters import Adapters, SlotsInUse, with_adapters
from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import RaggedBatch, batch_part, make_ragged_batch
from sgl_jax.runtime import speculate
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.device_state import DeviceState, apply_page_updates
from sgl_jax.runtime.layout import PlanLayout, StepInputs
from sgl_jax.runtime.speculate import RowTokens
from sgl_jax.runtime.step_spec import Pools, StepSpec
from sgl_jax.step_plan import Param


class Computed(NamedTuple):
    """Layers' output for the tokens of the device's own rank, beside the inputs, which are those of all M ranks."""

    pools: Pools
    state: DeviceState  # with the step's pages
    inputs: StepInputs
    rows: RowTokens
    batch: RaggedBatch  # the device's own
    valid: jax.Array  # bool[M * T]
    hidden: jax.Array  # [T, D]: output of the last layer, before the final norm
    tapped: list[jax.Array]  # [T, D] each: inputs of the layers that a draft model reads


def forward(
    weights: Weights[jax.Array],
    adapters: Adapters[jax.Array] | None,
    pools: Pools,
    state: DeviceState,
    vector: Int[Array, " size"],
    spec: StepSpec,
    layout: PlanLayout,
) -> Computed:
    """Unpack the plan, update page tables, embed and run the layers.

    Every device has the whole plan. Attention takes the tokens of the device's rank, MLPs those of all ranks.
    """
    ranks, bucket = spec.grid.data_axis, layout.bucket
    # Scopes name the stages in a profile (docs/features/profiling.md).
    with jax.named_scope("unpack"):
        inputs = layout.unpack(vector)
        state = apply_page_updates(state, inputs.page_updates)
        rows = speculate.row_tokens(inputs, state, layout)
        pages, num_short = state.page_table[ranks.own(inputs.rows)], ranks.own(inputs.num_short)[0]
        start, num_new = ranks.own(rows.start), ranks.own(inputs.num_new)
        sizes = bucket.num_tokens, layout.page_size
        batch = make_ragged_batch(pages, start, num_new, num_short, *sizes, ranks.own(rows.num_missing))
        used = inputs.num_new.reshape(layout.num_ranks, -1).sum(-1, keepdims=True)
        valid = (jnp.arange(bucket.num_tokens) < used).reshape(-1) & ~rows.missing

    target, slots = _adapted(weights, adapters, spec, inputs, batch)
    tokens, contexts = [], []
    for number in range(bucket.num_parts):
        of_part = functools.partial(_part, number=number, bucket=bucket)
        own = batch if bucket.num_parts == 1 else batch_part(batch, number, bucket.num_parts)
        of_slots = jax.tree.map(of_part, slots)
        tokens.append(of_part(rows.packed))
        contexts.append(spec.context(spec.config, own, of_part(valid), bucket.width, slots=of_slots))
    taps = spec.config.draft.target_layers if spec.config.draft else ()
    kv, *others = pools
    hidden, kv, tapped = decoder.hidden_states(target, spec.config, tokens, kv, contexts, taps)
    return Computed([kv, *others], state, inputs, rows, batch, valid, hidden, tapped)


def _part(x: Shaped[Array, " tokens"], number: int, bucket: Bucket) -> Shaped[Array, " part"]:
    """Return one of a bucket's parts of an x that has a value for each token of one rank, or of all."""
    return x.reshape(-1, bucket.num_parts, bucket.num_tokens // bucket.num_parts)[:, number].reshape(-1)


def _adapted(
    weights: Weights[jax.Array],
    adapters: Adapters[jax.Array] | None,
    spec: StepSpec,
    inputs: StepInputs,
    batch: RaggedBatch,
) -> tuple[Weights[jax.Array], SlotsInUse | None]:
    """Return the weights with the adapters' slots beside them, and the slot of each token; as they are, and None, in a launch
    that takes no adapters."""
    if adapters is None or spec.adapters is None:
        return weights, None
    ranks = spec.grid.data_axis
    own = (ranks.own(inputs.params[:, Param.ADAPTER]) - 1)[batch.token_row]
    layers = with_adapters(weights.layers, adapters, spec.adapters.number)
    return dataclasses.replace(weights, layers=layers), SlotsInUse(own, ranks.gather(own))
