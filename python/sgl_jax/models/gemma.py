"""Gemma 2 and Gemma 3 (text): norms around both halves of a layer, scaled embeddings, windows in most layers.

Gemma 2 caps scores and logits; Gemma 3 norms each head instead and rotates the layers with a window by another base.
"""

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, RopeConfig
from sgl_jax.models.hf_config import decoder, layer_windows, refuse_unless, required
from sgl_jax.models.raw_config import RawConfig, replaced, without
from sgl_jax.models.rope import resolve_rope

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
_BOTH = {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_ROPES = {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
DEFAULTS = {
    "Gemma2ForCausalLM": _BOTH | _CAPS | {"max_position_embeddings": 8192},
    "Gemma3ForCausalLM": _BOTH | _ROPES | {"max_position_embeddings": 131072},
}
NAMES = llama.NAMES.with_layer(
    {
        "post_attn_norm": (llama.LAYER + "post_attention_layernorm.weight",),
        "mlp_norm": (llama.LAYER + "pre_feedforward_layernorm.weight",),
        "post_mlp_norm": (llama.LAYER + "post_feedforward_layernorm.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    refuse_unless(hf, {"use_bidirectional_attention": False})
    is_gemma3 = hf["architectures"][0] == "Gemma3ForCausalLM"
    head_dim = required(hf, "head_dim")
    rope, local_rope = _ropes(hf, head_dim) if is_gemma3 else (resolve_rope(hf, head_dim), None)
    attention_bias = bool(hf.get("attention_bias", False))
    windows = _windows(hf, period=hf["sliding_window_pattern"] if is_gemma3 else 2)
    return decoder(
        without(hf, "rope_parameters", "rope_scaling"),
        head_dim=head_dim,
        hidden_act=hf.get("hidden_activation") or "gelu_pytorch_tanh",
        tie_embeddings=True,
        rope=rope,
        local_rope=local_rope,
        local_layers=tuple(window is not None for window in windows),
        sliding_windows=windows,
        norm_offset=1.0,
        sandwich_norms=True,
        embed_scale=required(hf, "hidden_size") ** 0.5,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=is_gemma3,
        query_scale=required(hf, "query_pre_attn_scalar") ** -0.5,
        attn_logit_softcap=hf.get("attn_logit_softcapping"),
        final_logit_softcap=hf.get("final_logit_softcapping"),
    )


def _windows(hf: RawConfig, period: int) -> tuple[int | None, ...]:
    """Return layer_types' windows, or else windows for all layers but the last of each period."""
    window, layers = required(hf, "sliding_window"), required(hf, "num_hidden_layers")
    if hf.get("layer_types") is not None:
        return layer_windows(hf, window)
    return tuple(window if (i + 1) % period else None for i in range(layers))


def _ropes(hf: RawConfig, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Read the rope of layers without and with a window: both are in rope_parameters, or older files have two bases."""
    both, bare = hf.get("rope_parameters") or {}, without(hf, "rope_parameters", "rope_scaling")
    if "full_attention" in both:
        kinds = ("full_attention", "sliding_attention")
        wide, local = (replaced(bare, {"rope_parameters": both[kind]}) for kind in kinds)
    else:
        wide, local = hf, replaced(bare, {"rope_theta": hf["rope_local_base_freq"]})
    return resolve_rope(wide, head_dim), resolve_rope(local, head_dim)
