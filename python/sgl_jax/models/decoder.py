"""The one decoder: embed, layers, norm, logits. Families differ in switches of DecoderConfig."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.layers import gated, logn_factors, rope_table
from sgl_jax.models.linear import GroupedLinear, Linear, gated_linear, linear
from sgl_jax.models.mla import latent_attention
from sgl_jax.models.moe import LayerExperts, moe_layer
from sgl_jax.models.weights import Experts, Layers, LayerWeights, Weights, head
from sgl_jax.ops.attention.api import QKPrepare, split_heads
from sgl_jax.ops.dense.api import GatedProduct, no_gated_product
from sgl_jax.ops.experts.api import RoutedExperts
from sgl_jax.ops.norm_rope import PLAIN_NORMS, Norms, rms_norm
from sgl_jax.parallel.grid import LONE, Grid

type LayerBody[X] = Callable[..., tuple[X, jax.Array]]  # X: one array for each part of a step; see decoder_layer


@runtime_checkable  # so that tests can check annotations
class Attend(Protocol):
    """Attention with the step's batch, spec, page counts and backend filled in (ops/attention/api.py).

    Where k and v are None, q is all three fused.
    """

    def __call__(
        self,
        q: Float[Array, "T heads H"],
        k: Float[Array, "T K H"] | None,
        v: Float[Array, "T K H"] | None,
        kv: Num[Array, "LP K planes page H"],
        *,
        layer: Int[Array, ""] | int,
        window: Int[Array, ""] | int | None,
        sinks: Float[Array, " N"] | None,
        kv_scales: Float[Array, "2"] | None,
        prepare: QKPrepare | None = None,
    ) -> tuple[Float[Array, "T N V"], Num[Array, "LP K planes page H"]]: ...


@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of the decoder that belong to one step, besides its tokens."""

    positions: Int[Array, " T"]
    valid: Bool[Array, " MT"]  # tokens of all ranks; False: padding, or a draft that its row lacks
    attend: Attend
    grouped: GroupedLinear
    compute_dtype: str  # dtype of the activations
    grid: Grid = LONE
    linear: Linear = linear
    gated: GatedProduct = no_gated_product
    routed: RoutedExperts | None = None  # as in ops/kernels.Kernels
    norms: Norms = PLAIN_NORMS


def hidden_states(
    weights: Weights[jax.Array],
    config: DecoderConfig,
    tokens: Sequence[Int[Array, " MT"]],
    kv: Num[Array, "LP K planes page H"],
    contexts: Sequence[Context],
    taps: Sequence[int] = (),
) -> tuple[Float[Array, "T D"], Num[Array, "LP K planes page H"], list[jax.Array]]:
    """Return the last layer's output, before the final norm, the pool with this step's KV, and the inputs of the layers in
    `taps`, where L stands for the output of the last.

    The tokens of a step come in one part or in several, each with its context. A layer computes one part after the other, and
    a part sees the KV of those before it; otherwise they do not depend on each other, so that one part's sums over the devices
    may take place beside products of the next. T is the number of tokens in all parts of a rank.

    On one of many devices, config and weights are its shard, `tokens` are those of all M ranks, and the output is that
    of its own rank. In between, x holds the tokens of its rank that `grid` gives to this device.
    """
    with jax.named_scope("embed"):
        xs = [_times(config.embed_scale, embed(weights.embed, *part)) for part in zip(tokens, contexts, strict=True)]

    def whole(xs: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate([context.grid.to_attention(x) for x, context in zip(xs, contexts, strict=True)])

    xs, kv, tapped = run_layers(decoder_layer(config, contexts), (xs, kv), weights.layers, taps)
    return whole(xs), kv, [*map(whole, tapped)]


def decoder_layer(
    config: DecoderConfig, contexts: Sequence[Context], first_layer: int = 0
) -> LayerBody[list[jax.Array]]:
    """Return the function of a layer, for run_layers. `first_layer` is the number in the pool of the first one.

    Its x is a list with one array for each part of the step. `joined` replaces the normed x as the input of attention.

    Barriers order several parts, because links and products would wait for each other as the compiler orders them. A part's
    attention is summed when the part before has been gathered for its MLP. The sum and its norm end before the second product of
    that MLP, beside which the part is gathered (docs/decisions/0036-long-steps-are-computed-in-parts.md).
    """
    scaled = functools.partial(_times, config.branch_scale)
    norms, numbers = contexts[0].norms, {"eps": config.rms_norm_eps, "offset": config.norm_offset}
    norm, added_norm = functools.partial(norms.norm, **numbers), functools.partial(norms.added_norm, **numbers)
    ropes, windows = [_rope_of_layer(config, context.positions) for context in contexts], _windows(config)

    def body(carry, layer: Int[Array, ""] | int, w: LayerWeights[jax.Array], experts=None, joined=None):
        xs, kv = carry
        window = None if windows is None else jnp.asarray(windows)[layer]

        def normed(out: jax.Array, post_norm: jax.Array | None) -> jax.Array:
            return scaled(out if post_norm is None else norm(out, post_norm))

        def attended(number: int, after: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
            """Return a part's x with the sum of attention's outputs, which is begun after `after`, and its norm."""
            with jax.named_scope("attention"):
                out = _summed(_behind(outs[number], after), w.o_bias, contexts[number].grid.from_attention)
                out = normed(out, w.post_attn_norm)
            with jax.named_scope("mlp"):
                return added_norm(xs[number], out, w.mlp_norm)

        outs, h = list[jax.Array](), None
        with jax.named_scope("attention"):
            for x, context, rope in zip(xs, contexts, ropes, strict=True):
                x = _behind(x, h)
                h = x if w.attn_norm is None else norm(x, w.attn_norm)
                h = context.grid.to_attention(h if joined is None else joined)
                out, kv = _attention(h, kv, w, config, rope(layer), context, first_layer + layer, window)
                outs.append(out)
        done: list[jax.Array] = []
        following = attended(0)  # x of the next part, and its norm, which is then gathered
        with jax.named_scope("mlp"):
            gathered = contexts[0].grid.to_mlp(following[1])
        for number, context in enumerate(contexts, 1):
            x, h = following[0], gathered
            with jax.named_scope("mlp"):
                hidden = _hidden(h, w, config, context)
            if number < len(contexts):
                following = attended(number, after=h)
            if len(contexts) > 1:
                hidden, following, done = lax.optimization_barrier((hidden, following, done))
            with jax.named_scope("mlp"):
                gathered = contexts[number].grid.to_mlp(following[1]) if number < len(contexts) else None
                out = _behind(_mlp(h, hidden, w, experts, config, context), gathered)
                done.append(x + normed(_summed(out, w.down_bias, context.grid.from_mlp), w.post_mlp_norm))
        return done, kv

    return body


def _behind[X](x: X, earlier: jax.Array | None) -> X:
    """Return x, whose users the compiler puts behind `earlier`."""
    return x if earlier is None else lax.optimization_barrier((x, earlier))[0]


def logits(
    weights: Weights[jax.Array], config: DecoderConfig, hidden: Float[Array, "S D"], linear: Linear = linear
) -> Float[Array, "S V"]:
    """Apply the final norm and the output head, float32. One of many devices computes its shard of the vocabulary."""
    with jax.named_scope("logits"):
        h = rms_norm(hidden, weights.final_norm, config.rms_norm_eps, config.norm_offset)
        out = linear(h, head(weights), site="lm_head", out_dtype=jnp.float32)
        out = out * config.logit_scale if config.logit_scale != 1 else out
        cap = config.final_logit_softcap
        return out if cap is None else cap * jnp.tanh(out / cap)


def run_layers[X](
    body: LayerBody[X], carry: tuple[X, jax.Array], layers: Layers[jax.Array], taps: Sequence[int] = ()
) -> tuple[X, jax.Array, list[X]]:
    """Thread the carry, x and the pool, through body(carry, layer index, layer weights, experts): a Python loop over a list of
    layers, a scan over each stack. Return both, and x before each of the layers in `taps`. x is an array or a list of them.

    Placing the weights decides which of the two a platform gets (docs/decisions/0002-layers-list-or-scan.md). The scan
    does not slice the experts of a stack, because grouped matmul takes them whole.
    """
    if isinstance(layers, list):
        layer, before = jax.jit(body), []  # traced and lowered once for each kind of layer, not once per layer
        for i, w in enumerate(layers):
            before.append(carry[0])
            w, experts = _split_experts(w)
            experts = jax.tree.map(lambda leaf: leaf[None], experts)
            carry = layer(carry, jnp.int32(i), w, experts and LayerExperts(experts, jnp.int32(0)))
        before.append(carry[0])
        return *carry, [before[i] for i in taps]
    first, tapped = 0, [jax.tree.map(jnp.zeros_like, carry[0]) for _ in taps]

    def with_taps(i, x: X, tapped: list[X]) -> list[X]:
        """Put x into the place of each tap that is layer i."""
        pairs = zip(taps, tapped, strict=True)
        return [jax.tree.map(lambda x, kept, at=at: jnp.where(i == at, x, kept), x, kept) for at, kept in pairs]

    for group in layers:
        group, experts = _split_experts(group)
        number = len(jax.tree.leaves(group)[0])

        def one(carry, x, experts=experts, first=first):
            (i, w), (carry, tapped) = x, carry
            tapped = with_taps(first + i, carry[0], tapped)
            return (body(carry, first + i, w, experts and LayerExperts(experts, i)), tapped), None

        (carry, tapped), _ = lax.scan(one, (carry, tapped), (jnp.arange(number), group))
        first += number
    x, kv = carry
    return x, kv, with_taps(first, x, tapped)


def _split_experts(w: LayerWeights[jax.Array]) -> tuple[LayerWeights[jax.Array], Experts[jax.Array] | None]:
    if w.moe is None:
        return w, None
    return dataclasses.replace(w, moe=dataclasses.replace(w.moe, experts=None)), w.moe.experts


_NO_WINDOW = 2**30  # wider than any context


def _windows(config: DecoderConfig) -> np.ndarray | None:
    """Return each layer's window, i32[L], or None if no layer has one. Full attention is a very wide window."""
    if config.sliding_windows is None:
        return None
    return np.array([w if w is not None else _NO_WINDOW for w in config.sliding_windows], np.int32)


def _rope_of_layer(config: DecoderConfig, positions: Int[Array, " T"]) -> Callable:
    """Return a function from a layer's index to its cos and sin, [T, rope]."""
    table = rope_table(positions, config.rope)
    if config.local_rope is None:
        return lambda layer: table
    both = jnp.stack([table, rope_table(positions, config.local_rope)])
    return lambda layer: both[jnp.asarray(config.local_layers, jnp.int32)[layer]]


def _times(factor: float, x: Float[Array, "t D"]) -> Float[Array, "t D"]:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def embed(table: Float[Array, "V D"], tokens: Int[Array, " MT"], context: Context) -> Float[Array, "t D"]:
    """Return the embedded tokens of all ranks, or of one of several devices those that it has between layers."""
    local, own = context.grid.all_axes.mine(tokens, len(table))
    x = jnp.where(own[:, None], table.at[local].get(mode="clip").astype(context.compute_dtype), 0)
    return context.grid.from_mlp(x)


def _attention(h, kv, w: LayerWeights[jax.Array], config: DecoderConfig, rope, context: Context, layer, window):
    """Return the device's addend of attention's output for the rank's tokens, [T, D], and the pool."""
    attend = functools.partial(context.attend, layer=layer, window=window, sinks=w.sinks, kv_scales=w.kv_scales)
    if config.mla is not None and w.mla is not None:
        out, kv = latent_attention(h, kv, w.mla, config.mla, rope, attend, context.linear)
    else:
        out, kv = _heads_attention(h, kv, w, config, rope, context, attend)
    out = context.grid.own_columns(out, config.head_replicas)
    return context.linear(out, w.o, site="o"), kv


def _heads_attention(h, kv, w: LayerWeights[jax.Array], config: DecoderConfig, rope, context: Context, attend):
    """Return the heads' outputs side by side, [T, N * H], and the pool."""
    q, k, v = context.linear(h, w.qkv, w.qkv_bias, site="qkv").reshape(len(h), -1, config.head_dim), None, None
    if config.logn_scaling is not None:
        q, k, v = split_heads(q, config.num_kv_heads)
        q = (q * logn_factors(context.positions, config.logn_scaling)[:, None, None]).astype(q.dtype)
    prepare = QKPrepare(_scales(w.q_norm, config), _scales(w.k_norm, config), rope, config.rms_norm_eps)
    out, kv = attend(q, k, v, kv, prepare=prepare)
    return out.reshape(len(h), -1), kv


def _scales(norm: Float[Array, " H"] | None, config: DecoderConfig) -> Float[Array, " H"] | None:
    """Return the factors of a normed head: the weight, plus the model's offset."""
    return norm if norm is None or config.norm_offset == 0 else norm.astype(jnp.float32) + config.norm_offset


def _act(config: DecoderConfig) -> Callable:
    return functools.partial(gated, activation=config.activation, limit=config.gate_limit)


def _hidden(h, w: LayerWeights[jax.Array], config: DecoderConfig, context: Context) -> jax.Array | None:
    """Return the neurons of the MLP, [T, F]; None: the layer has experts alone."""
    if w.down is None:
        return None
    return gated_linear(h, w.gate_up, w.gate_up_bias, _act(config), context.gated, context.linear)


def _mlp(h, hidden, w: LayerWeights[jax.Array], experts: LayerExperts | None, config: DecoderConfig, context: Context):
    """Return the device's addend of the output of the MLP, the experts, or both, whose sum is scaled."""
    outs = [] if hidden is None else [context.linear(hidden, w.down, site="down")]  # this device's addend of each
    if w.moe is not None and experts is not None and config.moe is not None:
        products = context.grouped, context.linear, context.grid, context.routed
        outs.append(moe_layer(h, w.moe, experts, config.moe, _act(config), context.valid, *products))
        if config.moe.residual_scale is not None:
            outs = [sum(outs) * jnp.asarray(config.moe.residual_scale, h.dtype)]
    return outs[0]


def _summed(partial: Float[Array, "T D"], bias: Float[Array, " D"] | None, over: Callable) -> Float[Array, "t D"]:
    """Sum the devices' addends with `over`, then add the bias once."""
    out = over(partial)
    return out if bias is None else out + bias.astype(out.dtype)
