"""Reads a config.json strictly, for the family files. A value that would be ignored is refused instead."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from sgl_jax.models.decoder_config import DecoderConfig, RopeConfig
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.rope import context_length, longer_context, resolve_rope

logger = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier")
_SCALES = (*_MULTIPLIERS, "logits_scaling", "logit_scale", "scale_emb", "scale_depth")


def required(hf: RawConfig, key: str) -> Any:
    """Return the value of a key. Raises ModelError where it is null or absent."""
    if hf.get(key) is None:
        raise ModelError(f"config.json has no {key}; it is needed to build the model")
    return hf[key]


def refuse_unless(hf: RawConfig, served: Mapping[str, object]) -> None:
    """Raise ModelError for a key whose value is neither the one that is served, or one of several in a tuple, nor null."""
    for key, values in served.items():
        values = values if isinstance(values, tuple) else (values,)
        if hf.get(key) not in (*values, None):
            listed = " or ".join(map(repr, values))
            raise ModelError(f"config.json sets {key}={hf[key]!r}; {hf['architectures'][0]} is served with {listed}")


def decoder(
    hf: RawConfig,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_act: str | None = None,
    tie_embeddings: bool = False,
    rope: RopeConfig | None = None,
    sliding_windows: tuple[int | None, ...] | None = None,
    **switches: Any,
) -> DecoderConfig:
    """Translate the keys that all families spell alike. The arguments are decisions of the family.

    Arguments that are None are read from `hf`, except `sliding_windows`, where None is full attention. `tie_embeddings`
    holds if `hf` does not say. `switches` are fields of DecoderConfig. Raises ModelError for missing keys and values
    not served.
    """
    architecture, hidden_act = hf["architectures"][0], hidden_act or hf.get("hidden_act", "silu")
    if hidden_act not in _ACTIVATIONS:
        raise ModelError(f"config.json sets hidden_act={hidden_act!r}; supported are {', '.join(_ACTIVATIONS)}")
    if unknown := [key for key in _SCALES if hf.get(key) not in (None, 1, 1.0)]:
        raise ModelError(f"config.json sets {', '.join(unknown)}; {architecture} has no such scale here")
    has_windows = "sliding_attention" in (hf.get("layer_types") or ()) and "use_sliding_window" not in hf
    if has_windows and sliding_windows is None:
        raise ModelError(f"config.json has layer_types with sliding_attention; {architecture} has no windows here")
    hidden_size, num_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    required(hf, "max_position_embeddings")
    if any(window is not None and window < 1 for window in sliding_windows or ()):
        raise ModelError(f"config.json sets sliding_window={hf.get('sliding_window')!r}; it must be 1 or more, or null")
    head_dim = head_dim or hf.get("head_dim") or hidden_size // num_heads
    num_kv_heads = num_kv_heads or hf.get("num_key_value_heads") or num_heads  # null, too, means as many
    if num_heads % num_kv_heads:
        heads = f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}"
        raise ModelError(f"config.json: {heads}")
    return DecoderConfig(
        architecture=architecture,
        vocab_size=required(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=required(hf, "intermediate_size"),
        num_layers=required(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope or resolve_rope(hf, head_dim),
        context_length=_plain_length(hf),
        longer=longer_context(hf, head_dim) if rope is None else None,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", tie_embeddings)),
        activation=_ACTIVATIONS[hidden_act],
        sliding_windows=sliding_windows,
        eos_token_ids=eos_token_ids(hf),
        num_mtp_layers=hf.get("num_nextn_predict_layers") or 0,
        **switches,
    )


def _plain_length(hf: RawConfig) -> int:
    """Return the length of contexts whose positions are plain: the dual chunk attention of Qwen2.5-1M changes positions
    behind its first chunk (https://arxiv.org/abs/2402.17463, section 3)."""
    length, chunks = context_length(hf), hf.get("dual_chunk_attention_config")
    if not chunks:
        return length
    first = required(chunks, "chunk_size") - required(chunks, "local_size")
    if first < length:
        logger.warning(
            "Contexts are limited to %d tokens, not %d: beyond, dual_chunk_attention_config would change positions. Remove it "
            "from config.json to go on without.",
            first,
            length,
        )
    return min(first, length)


def eos_token_ids(config: RawConfig) -> tuple[int, ...]:
    """Return eos_token_id as a tuple: it may be one id, a list of them, or absent."""
    ids = config.get("eos_token_id")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def layer_windows(hf: RawConfig, window: int) -> tuple[int | None, ...]:
    """Return each layer's window as layer_types says; None is full attention."""
    num_layers, known = required(hf, "num_hidden_layers"), {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(hf["layer_types"]) - set(known))
    if unknown or len(hf["layer_types"]) != num_layers:
        raise ModelError(
            f"config.json: layer_types must name {' or '.join(known)} for each of {num_layers} layers; "
            f"it has {len(hf['layer_types'])} entries{', among them ' + ', '.join(unknown) if unknown else ''}"
        )
    return tuple(known[kind] for kind in hf["layer_types"])


def uniform_windows(hf: RawConfig) -> tuple[int | None, ...] | None:
    """Return sliding_window for every layer, None where it is null or absent."""
    window = hf.get("sliding_window")
    return None if window is None else (window,) * required(hf, "num_hidden_layers")


def qwen_sliding_windows(hf: RawConfig) -> tuple[int | None, ...] | None:
    """Return the windows of Qwen 2 and 3: none unless use_sliding_window is set, else in the layers that layer_types
    names or, without it, from max_window_layers on."""
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return None
    num_layers, window = required(hf, "num_hidden_layers"), hf["sliding_window"]
    if hf.get("layer_types") is not None:
        return layer_windows(hf, window)
    return tuple(window if layer >= hf["max_window_layers"] else None for layer in range(num_layers))
