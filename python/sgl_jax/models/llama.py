"""Llama 2 / 3 and the many models in its layout; Mistral, which adds a sliding window to every layer."""

from __future__ import annotations

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, kv_heads, required
from sgl_jax.models.names import TensorNames
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
DEFAULTS = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
}

NAMES = TensorNames(
    embed="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
    layer={
        "attn_norm": ("model.layers.{i}.input_layernorm.weight",),
        "qkv": (
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        "qkv_bias": (
            "model.layers.{i}.self_attn.q_proj.bias",
            "model.layers.{i}.self_attn.k_proj.bias",
            "model.layers.{i}.self_attn.v_proj.bias",
        ),
        "q_norm": ("model.layers.{i}.self_attn.q_norm.weight",),
        "k_norm": ("model.layers.{i}.self_attn.k_norm.weight",),
        "o": ("model.layers.{i}.self_attn.o_proj.weight",),
        "o_bias": ("model.layers.{i}.self_attn.o_proj.bias",),
        "mlp_norm": ("model.layers.{i}.post_attention_layernorm.weight",),
        "gate_up": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        "gate_up_bias": ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        "down": ("model.layers.{i}.mlp.down_proj.weight",),
        "down_bias": ("model.layers.{i}.mlp.down_proj.bias",),
    },
    ignored=(r"\.rotary_emb\.inv_freq$",),
)


def config(hf: RawConfig) -> DecoderConfig:
    architecture = hf["architectures"][0]
    return _mistral(hf) if architecture == "MistralForCausalLM" else _llama(hf)


def _llama(hf: RawConfig) -> DecoderConfig:
    attention_bias = bool(hf.get("attention_bias", False))
    return decoder(
        hf,
        architecture="LlamaForCausalLM",
        num_kv_heads=kv_heads(hf),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


def _mistral(hf: RawConfig) -> DecoderConfig:
    window = hf.get("sliding_window")
    return decoder(
        hf,
        architecture="MistralForCausalLM",
        num_kv_heads=kv_heads(hf),
        sliding_windows=(window,) * required(hf, "num_hidden_layers") if window is not None else None,
    )
