"""Phi-3, Phi-4 and Phi-4-mini: q, k and v fused, gate and up fused, a part of each head rotated, longrope.

Source: transformers 5, models/phi3. The same class serves all of them; Phi-3-small and Phi-3.5-MoE are other models.
"""

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import decoder, uniform_windows
from sgl_jax.models.raw_config import RawConfig, replaced, without

ARCHITECTURES = ("Phi3ForCausalLM",)
_LENGTHS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
DEFAULTS = {"Phi3ForCausalLM": _LENGTHS | {"rms_norm_eps": 1e-5}}
NAMES = llama.NAMES.with_layer(
    {"qkv": (llama.ATTENTION + "qkv_proj.weight",), "gate_up": (llama.MLP + "gate_up_proj.weight",)}
)


def config(hf: RawConfig) -> DecoderConfig:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):  # names of longrope in the first files
        rope = without(rope, "type") | {"rope_type": "longrope"}
    renamed = replaced(without(hf, "rope_scaling"), {"rope_parameters": rope})
    return decoder(renamed, sliding_windows=uniform_windows(hf))
