"""Llama 2 / 3 and the many models in its layout; Mistral, which adds a sliding window to every layer."""

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, uniform_windows
from sgl_jax.models.names import TensorNames
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
DEFAULTS = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
}

LAYER = "model.layers.{i}."  # prefix in most families
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."
NAMES = TensorNames(
    embed="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
    layer={
        "attn_norm": (LAYER + "input_layernorm.weight",),
        "qkv": (ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"),
        "qkv_bias": (ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"),
        "q_norm": (ATTENTION + "q_norm.weight",),
        "k_norm": (ATTENTION + "k_norm.weight",),
        "o": (ATTENTION + "o_proj.weight",),
        "o_bias": (ATTENTION + "o_proj.bias",),
        "mlp_norm": (LAYER + "post_attention_layernorm.weight",),
        "gate_up": (MLP + "gate_proj.weight", MLP + "up_proj.weight"),
        "gate_up_bias": (MLP + "gate_proj.bias", MLP + "up_proj.bias"),
        "down": (MLP + "down_proj.weight",),
        "down_bias": (MLP + "down_proj.bias",),
    },
    ignored=(r"\.rotary_emb\.inv_freq$",),
)


def config(hf: RawConfig) -> DecoderConfig:
    if hf["architectures"][0] == "MistralForCausalLM":
        return decoder(hf, sliding_windows=uniform_windows(hf))
    attention_bias, mlp_bias = bool(hf.get("attention_bias", False)), bool(hf.get("mlp_bias", False))
    return decoder(hf, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)
