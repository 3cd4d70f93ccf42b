"""Families in Llama's layout that differ from it in a few switches: Gemma 1, Granite, Seed-OSS, SmolLM3.

Sources: transformers 5, `modeling_*.py` and `configuration_*.py` of each.
"""

from typing import Any

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, RopeConfig
from sgl_jax.models.hf_config import decoder, layer_windows, refuse_unless, required
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig, replaced, without
from sgl_jax.models.rope import resolve_rope

ARCHITECTURES = ("GemmaForCausalLM", "GraniteForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM")
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_SMOLLM3 = {"num_key_value_heads": 4, "rope_theta": 2e6, "no_rope_layer_interval": 4, "use_sliding_window": False}
DEFAULTS = {
    "GemmaForCausalLM": {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192},
    "GraniteForCausalLM": dict.fromkeys(_MULTIPLIERS, 1.0) | {"max_position_embeddings": 2048},
    "SeedOssForCausalLM": {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288},
    "SmolLM3ForCausalLM": _SMOLLM3 | {"max_position_embeddings": 32768},
}
NAMES = llama.NAMES


def config(hf: RawConfig) -> DecoderConfig:
    match hf["architectures"][0]:
        case "GemmaForCausalLM":
            return _gemma(hf)
        case "GraniteForCausalLM":
            scales = {key: required(hf, key) for key in _MULTIPLIERS}
            return decoder(
                without(hf, *_MULTIPLIERS),
                embed_scale=scales["embedding_multiplier"],
                query_scale=scales["attention_multiplier"],
                branch_scale=scales["residual_multiplier"],
                logit_scale=1 / scales["logits_scaling"],
                **_biases(hf),
            )
        case "SeedOssForCausalLM":
            biases = _biases(hf, attention=True) | {"o_bias": bool(hf.get("attention_out_bias", False))}
            return decoder(hf, **biases)
        case _:
            return _smollm3(hf)


def _biases(hf: RawConfig, attention: bool = False) -> dict[str, Any]:
    """Return the switches of biases; `attention` is the default of attention_bias."""
    attention = bool(hf.get("attention_bias", attention))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(hf.get("mlp_bias", False))}


def _gemma(hf: RawConfig) -> DecoderConfig:
    refuse_unless(hf, {"use_bidirectional_attention": False})
    act = hf.get("hidden_act") or "gelu"
    return decoder(
        hf,
        hidden_act="gelu_pytorch_tanh" if act == "gelu" else act,  # as in training, whatever the first files said
        tie_embeddings=True,
        norm_offset=1.0,
        embed_scale=required(hf, "hidden_size") ** 0.5,
        **_biases(hf),
    )


def _smollm3(hf: RawConfig) -> DecoderConfig:
    """Translate SmolLM3: some layers do not rotate at all, which is a rope that turns by nothing."""
    layers, every = required(hf, "num_hidden_layers"), required(hf, "no_rope_layer_interval")
    rotates = hf.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]  # 1 where a layer has rope
    if len(rotates) != layers:
        raise ModelError(f"config.json: no_rope_layers has {len(rotates)} entries; there are {layers} layers")
    windows = None
    if hf["use_sliding_window"] and hf.get("sliding_window") is not None:
        types = hf.get("layer_types") or [("sliding_attention", "full_attention")[bool(one)] for one in rotates]
        windows = layer_windows(replaced(hf, {"layer_types": types}), hf["sliding_window"])
    head_dim = hf.get("head_dim") or required(hf, "hidden_size") // required(hf, "num_attention_heads")
    rope = resolve_rope(hf, head_dim)
    return decoder(
        hf,
        rope=rope,
        local_rope=None if all(rotates) else RopeConfig((0.0,) * len(rope.inv_freq)),
        local_layers=tuple(not one for one in rotates),
        sliding_windows=windows,
        tie_embeddings=True,
        **_biases(hf),
    )
