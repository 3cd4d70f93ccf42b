"""Mixtral: Mistral with experts in place of every MLP."""

from __future__ import annotations

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, kv_heads, required
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("MixtralForCausalLM",)
DEFAULTS = {
    "MixtralForCausalLM": {
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131072},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    }
}
NAMES = llama.NAMES.with_layer(
    {
        "moe.router": ("model.layers.{i}.block_sparse_moe.gate.weight",),
        "moe.experts.gate_up": (
            "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
            "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
        ),
        "moe.experts.down": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    window = hf.get("sliding_window")
    return decoder(
        hf,
        architecture="MixtralForCausalLM",
        num_kv_heads=kv_heads(hf),
        sliding_windows=(window,) * required(hf, "num_hidden_layers") if window is not None else None,
        moe=MoeConfig(
            num_experts=required(hf, "num_local_experts"),
            experts_per_token=required(hf, "num_experts_per_tok"),
            intermediate_size=required(hf, "intermediate_size"),
        ),
    )
