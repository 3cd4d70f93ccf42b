"""Qwen 3, dense: an RMS norm over each head of q and k, head_dim of its own, no bias by default."""

from sgl_jax.models import llama, qwen2
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, qwen_sliding_windows
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Qwen3ForCausalLM",)
DEFAULTS = {"Qwen3ForCausalLM": qwen2.DEFAULTS["Qwen2ForCausalLM"] | {"head_dim": 128}}
NAMES = llama.NAMES


def config(hf: RawConfig) -> DecoderConfig:
    bias, windows = bool(hf.get("attention_bias", False)), qwen_sliding_windows(hf)
    return decoder(hf, qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_windows=windows)
