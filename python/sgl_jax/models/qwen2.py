"""Qwen 2 and 2.5: Llama's layout with a bias on q, k and v."""

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, qwen_sliding_windows
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Qwen2ForCausalLM",)
WINDOWS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
DEFAULTS = {"Qwen2ForCausalLM": WINDOWS | {"num_key_value_heads": 32}}
NAMES = llama.NAMES


def config(hf: RawConfig) -> DecoderConfig:
    return decoder(hf, qkv_bias=True, sliding_windows=qwen_sliding_windows(hf))
