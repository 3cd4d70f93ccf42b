"""Forward pass of a draft model inside the target's step; DraftConfig says what the kinds are."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from sgl_jax.models import decoder
from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig
from sgl_jax.models.linear import Linear
from sgl_jax.models.weights import DraftWeights, Weights, head
from sgl_jax.ops.norm_rope import rms_norm


def features(
    weights: Weights[jax.Array],
    config: DecoderConfig,
    hidden: Float[Array, "T Dt"],
    tapped: Sequence[Float[Array, "T Dt"]],
    linear: Linear,
) -> Float[Array, "T D"]:
    """Return the feature of each token, from the target's last hidden states and those of its `target_layers`."""
    draft, w = parts(weights, config)
    states = [*tapped] or [rms_norm(hidden, weights.final_norm, config.rms_norm_eps, config.norm_offset)]
    if draft.kind != "eagle3" or w.fc is None:
        return states[0]
    norm = functools.partial(rms_norm, eps=draft.decoder.rms_norm_eps)
    if w.fc_norms:
        states = [*map(norm, states, w.fc_norms)]
    joined = jnp.concatenate(states, axis=-1)
    return linear(joined if w.fc_norm is None else norm(joined, w.fc_norm), w.fc, w.fc_bias, site="fc")


def forward(
    weights: Weights[jax.Array],
    config: DecoderConfig,
    tokens: Int[Array, " MT"],
    feature: Float[Array, "T D"] | None,
    kv: Num[Array, "LP K planes page H"],
    context: decoder.Context,
    first_layer: int,
) -> tuple[Float[Array, "T D"], Num[Array, "LP K planes page H"]]:
    """Return the last layer's output and the pool. `feature` is that of the token before each; None of a standalone model.
    `first_layer` is the number of its first layer in the pool."""
    draft, w = parts(weights, config)
    norm, linear = functools.partial(rms_norm, eps=draft.decoder.rms_norm_eps), context.linear
    x = decoder.embed(weights.embed if w.embed is None else w.embed, tokens, context)
    layers, body = w.layers, decoder.decoder_layer(draft.decoder, [context], first_layer)
    if feature is None:
        x = x * jnp.asarray(draft.decoder.embed_scale, x.dtype)
    elif draft.kind == "eagle3":
        attn_norm = layers[0].attn_norm
        assert attn_norm is not None
        assert w.feature_norm is not None
        normed = norm(feature, w.feature_norm)
        joined = jnp.concatenate([norm(x, attn_norm), normed], axis=-1)
        x = normed if draft.norm_before_residual else feature
        [x], kv, _ = decoder.run_layers(functools.partial(body, joined=joined), ([x], kv), layers[:1])
        layers, body = layers[1:], decoder.decoder_layer(draft.decoder, [context], first_layer + 1)
    else:
        if w.embed_norm is not None and w.feature_norm is not None:
            x, feature = norm(x, w.embed_norm), norm(feature, w.feature_norm)
        x = linear(jnp.concatenate([x, feature], axis=-1), w.fc, w.fc_bias, site="fc")
    [x], kv, _ = decoder.run_layers(body, ([x], kv), layers)
    return x, kv


def recycled(weights: Weights[jax.Array], config: DecoderConfig, hidden: Float[Array, "S D"]) -> Float[Array, "S D"]:
    """Return the feature of a drafted token, from the output that drafted the next."""
    draft, w = parts(weights, config)
    return _normed(draft, w, hidden) if draft.recycles_normed else hidden


def logits(
    weights: Weights[jax.Array], config: DecoderConfig, hidden: Float[Array, "S D"], linear: Linear
) -> Float[Array, "S V"]:
    """Return scores of the draft vocabulary in the order of its logits, which may be scaled. One of many devices computes its
    shard."""
    draft, w = parts(weights, config)
    matrix = w.lm_head if w.lm_head is not None else w.embed if draft.kind == "standalone" else head(weights)
    return linear(_normed(draft, w, hidden), matrix, site="lm_head", out_dtype=jnp.float32)


def parts(weights: Weights[jax.Array], config: DecoderConfig) -> tuple[DraftConfig, DraftWeights[jax.Array]]:
    """Return the description and the weights of the draft model, which must be there."""
    assert config.draft is not None
    assert weights.draft is not None
    return config.draft, weights.draft


def _normed(draft: DraftConfig, w: DraftWeights[jax.Array], hidden: Float[Array, "S D"]) -> Float[Array, "S D"]:
    own = draft.decoder
    return hidden if w.final_norm is None else rms_norm(hidden, w.final_norm, own.rms_norm_eps, own.norm_offset)
