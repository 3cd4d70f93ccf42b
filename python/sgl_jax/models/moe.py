"""Mixture of experts in two parts: the choice of each token's experts (route) and their work (dispatch)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.models.decoder_config import MoeConfig
from sgl_jax.models.linear import GroupedLinear, Linear, linear
from sgl_jax.models.quantised import Quantised
from sgl_jax.models.weights import Experts, MoeWeights
from sgl_jax.ops.dense.api import Gated
from sgl_jax.ops.experts.api import LINE, RoutedExperts
from sgl_jax.parallel.grid import LONE, Grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerExperts:
    """The matrices of all layers' experts, and the index of one layer."""

    experts: Experts[jax.Array]  # leaves [L, E, …]
    layer: Int[Array, ""]


def route(
    x: Float[Array, "T D"], w: MoeWeights[jax.Array], moe: MoeConfig, linear: Linear = linear
) -> tuple[Float[Array, "T X"], Int[Array, "T X"]]:
    """Choose each token's experts. Returns their weights, float32, and their ids."""
    logits = linear(x, w.router, w.router_bias, site="moe.router", out_dtype=jnp.float32)
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
    grouped: GroupedLinear,
    grid: Grid = LONE,
    routed: RoutedExperts | None = None,
) -> Float[Array, "T D"]:
    """Send each token through its experts and sum their weighed outputs. Tokens that are not valid take none. `routed` does
    all of it, where there is one and it takes the matrices; else tokens are sorted by expert, and copied.

    One of many devices returns its addend of the sum: that of the experts it holds, or of its part of their neurons.
    """
    held, per_token = jax.tree.leaves(at.experts.down)[0].shape[1], ids.shape[1]
    group, part = divmod(grid.all_axes.index(), grid.expert_width)
    indices = ids - group * held
    used = valid[:, None] & (indices >= 0) & (indices < held)
    expert, experts = jnp.where(used, indices, held), at.experts  # number `held` is no expert
    if routed is not None and (matrices := _plain_matrices(experts, x)) is not None:
        out = routed(x, *matrices, at.layer, expert, weights, gated, held * grid.expert)
        if out is not None:
            return out
    expert = expert.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros(held, jnp.int32).at[expert].add(1, mode="drop")
    sorted_expert = expert[order]
    multiply = functools.partial(grouped, layer=at.layer, group_sizes=sizes)
    h = multiply(x[order // per_token], experts.gate_up, site="moe.experts.gate_up")
    if experts.gate_up_bias is not None:
        h += experts.gate_up_bias.at[at.layer, sorted_expert].get(mode="clip").astype(h.dtype)
    h = multiply(gated(*jnp.split(h, 2, axis=-1)), experts.down, site="moe.experts.down")
    if experts.down_bias is not None:
        bias = experts.down_bias.at[at.layer, sorted_expert].get(mode="clip").astype(h.dtype)
        h += jnp.where(part == 0, bias, 0)  # added by one of the devices that share an expert
    back = h[jnp.argsort(order)].reshape(*ids.shape, -1)
    return jnp.where(used[..., None], back * weights[..., None], 0.0).sum(1).astype(x.dtype)


def _plain_matrices(experts: Experts[jax.Array], x: Float[Array, "T D"]) -> tuple[jax.Array, jax.Array] | None:
    """Return the matrices if RoutedExperts takes them: of x's dtype, without biases, and D a multiple of its lines."""
    gate_up, down = experts.gate_up, experts.down
    if isinstance(gate_up, Quantised) or isinstance(down, Quantised) or {gate_up.dtype, down.dtype} != {x.dtype}:
        return None
    has_biases = experts.gate_up_bias is not None or experts.down_bias is not None
    return None if has_biases or x.shape[1] % LINE else (gate_up, down)


def moe_layer(
    x: Float[Array, "T D"],
    w: MoeWeights[jax.Array],
    at: LayerExperts,
    moe: MoeConfig,
    gated: Gated,
    valid: Bool[Array, " T"],
    grouped: GroupedLinear,
    linear: Linear = linear,
    grid: Grid = LONE,
    routed: RoutedExperts | None = None,
) -> Float[Array, "T D"]:
    """Add the outputs of routed and shared experts. One of many devices returns its addend of the sum."""
    weights, ids = route(x, w, moe, linear)
    out = dispatch(x, weights, ids, valid, at, gated, grouped, grid, routed)
    if w.shared_down is None:
        return out
    h = gated(*jnp.split(linear(x, w.shared_gate_up, site="moe.shared_gate_up"), 2, axis=-1))
    shared = linear(h, w.shared_down, site="moe.shared_down")
    if w.shared_gate is not None:
        shared *= jax.nn.sigmoid(linear(x, w.shared_gate, site="moe.shared_gate"))
    return out + shared
