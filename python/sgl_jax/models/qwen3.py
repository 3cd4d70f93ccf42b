"""Qwen 3, dense: an RMS norm over each head of q and k, head_dim of its own, no bias by default."""

from __future__ import annotations

from sgl_jax.models import llama, qwen2
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, kv_heads, qwen_sliding_windows
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Qwen3ForCausalLM",)
DEFAULTS = {"Qwen3ForCausalLM": qwen2.DEFAULTS["Qwen2ForCausalLM"] | {"head_dim": 128}}
NAMES = llama.NAMES


def config(hf: RawConfig) -> DecoderConfig:
    attention_bias = bool(hf.get("attention_bias", False))
    return decoder(
        hf,
        architecture="Qwen3ForCausalLM",
        num_kv_heads=kv_heads(hf),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        sliding_windows=qwen_sliding_windows(hf),
    )
