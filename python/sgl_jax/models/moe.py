"""The mixture of experts: which experts a token takes (routing), and their work (dispatch), apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.models.config import MoeConfig
from sgl_jax.models.weights import Experts, MoeWeights
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.parallel.grid import LONE, Grid

Gated = Callable[[Float[Array, "M FF"]], Float[Array, "M F"]]  # the activation of gate and up side by side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer, where they are: the matrices of all layers, and an index."""

    experts: Experts  # leaves [L, E, …]
    layer: Any  # i32[]


def route(x: Float[Array, "T D"], w: MoeWeights, moe: MoeConfig) -> tuple[Float[Array, "T X"], Int[Array, "T X"]]:
    """The weights, float32, and the ids of each token's experts."""
    logits = jnp.einsum("ed,td->te", w.router, x, preferred_element_type=jnp.float32)
    if w.router_bias is not None:
        logits += w.router_bias.astype(jnp.float32)
    if moe.router_softcap is not None:
        logits = moe.router_softcap * jnp.tanh(logits / moe.router_softcap)
    scores = jax.nn.softmax(logits, axis=-1) if moe.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if w.score_bias is None else scores + w.score_bias.astype(jnp.float32)
    if moe.num_groups > 1:
        choice = jnp.where(_in_best_groups(choice, moe), choice, -jnp.inf)
    _, ids = lax.top_k(choice, moe.experts_per_token)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if moe.normalise:
        weights /= weights.sum(-1, keepdims=True) + 1e-20
    return weights * moe.scale, ids.astype(jnp.int32)


def _in_best_groups(choice: Float[Array, "T E"], moe: MoeConfig) -> Bool[Array, "T E"]:
    grouped = choice.reshape(len(choice), moe.num_groups, -1)
    best, _ = lax.top_k(grouped, 1 if moe.group_score == "max" else 2)
    _, groups = lax.top_k(best.sum(-1), moe.groups_per_token)  # [T, groups_per_token]
    chosen = (groups[..., None] == jnp.arange(moe.num_groups)).any(1)
    return jnp.repeat(chosen, grouped.shape[-1], axis=-1)


def dispatch(
    x: Float[Array, "T D"],
    weights: Float[Array, "T X"],
    ids: Int[Array, "T X"],
    valid: Bool[Array, " T"],
    at: LayerExperts,
    gated: Gated,
    grouped_matmul: GroupedMatmul,
    grid: Grid = LONE,
) -> Float[Array, "T D"]:
    """Each token through its experts, weighed and summed. Tokens are sorted by expert; padding takes none.

    On one of many devices: its share of the sum, from the experts it holds, or from its part of their neurons.
    """
    held, per_token = at.experts.down.shape[1], ids.shape[1]
    group, part = divmod(grid.all_axes.index(), grid.expert_width)
    places = ids - group * held
    used = valid[:, None] & (places >= 0) & (places < held)
    expert = jnp.where(used, places, held).reshape(-1)  # [T * X], the last group is no group
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros(held, jnp.int32).at[expert].add(1, mode="drop")
    experts, sorted_expert = at.experts, expert[order]
    h = grouped_matmul(x[order // per_token], experts.gate_up, at.layer, sizes)
    if experts.gate_up_bias is not None:
        h += experts.gate_up_bias.at[at.layer, sorted_expert].get(mode="clip")
    h = grouped_matmul(gated(h), experts.down, at.layer, sizes)
    if experts.down_bias is not None:
        bias = experts.down_bias.at[at.layer, sorted_expert].get(mode="clip")
        h += jnp.where(part == 0, bias, 0)  # once in the sum over the devices that share an expert
    back = h[jnp.argsort(order)].reshape(*ids.shape, -1)
    return jnp.where(used[..., None], back * weights[..., None], 0.0).sum(1).astype(x.dtype)


def moe_layer(
    x: Float[Array, "T D"],
    w: MoeWeights,
    at: LayerExperts,
    moe: MoeConfig,
    gated: Gated,
    valid: Bool[Array, " T"],
    grouped_matmul: GroupedMatmul,
    grid: Grid = LONE,
) -> Float[Array, "T D"]:
    """Routed experts plus the shared one. On one of many devices: its share of the sum."""
    weights, ids = route(x, w, moe)
    out = dispatch(x, weights, ids, valid, at, gated, grouped_matmul, grid)
    if w.shared_down is None:
        return out
    h = gated(jnp.einsum("fd,td->tf", w.shared_gate_up, x))
    shared = jnp.einsum("df,tf->td", w.shared_down, h)
    if w.shared_gate is not None:
        shared *= jax.nn.sigmoid(jnp.einsum("od,td->to", w.shared_gate, x))
    return out + shared
