"""Qwen 1 (Qwen-7B-Chat and its like): fused q, k and v with a bias, the MLP's gate stored second, tiktoken vocabulary.

Source: modeling_qwen.py, which comes with the models. Within seq_length tokens, those of training, rope is plain. With
use_dynamic_ntk a longer prompt is rotated by another base, chosen by the prompt's length, so two prompts of unlike
length could not share the KV of their common start. Contexts therefore end at seq_length; with use_dynamic_ntk off they
go on with plain rope, and use_logn_attn scales queries there.
"""

import logging

from sgl_jax.models.decoder_config import DecoderConfig, LognScaling
from sgl_jax.models.hf_config import decoder, refuse_unless, required
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import TensorNames
from sgl_jax.models.raw_config import RawConfig, replaced

logger = logging.getLogger(__name__)

ARCHITECTURES = ("QWenLMHeadModel",)
_LAYER = "transformer.h.{i}."
NAMES = TensorNames(
    embed="transformer.wte.weight",
    final_norm="transformer.ln_f.weight",
    lm_head="lm_head.weight",
    layer={
        "attn_norm": (_LAYER + "ln_1.weight",),
        "qkv": (_LAYER + "attn.c_attn.weight",),
        "qkv_bias": (_LAYER + "attn.c_attn.bias",),
        "o": (_LAYER + "attn.c_proj.weight",),
        "o_bias": (_LAYER + "attn.c_proj.bias",),
        "mlp_norm": (_LAYER + "ln_2.weight",),
        "gate_up": (_LAYER + "mlp.w2.weight", _LAYER + "mlp.w1.weight"),
        "gate_up_bias": (_LAYER + "mlp.w2.bias", _LAYER + "mlp.w1.bias"),
        "down": (_LAYER + "mlp.c_proj.weight",),
        "down_bias": (_LAYER + "mlp.c_proj.bias",),
    },
    ignored=(r"\.rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attn\.logn_tensor$"),
)

_CHATML_STOPS = (151645, 151644)  # <|im_end|>, <|im_start|>
# Every model that was published as this architecture has these values, and none of these keys.
_SERVED = {"scale_attn_weights": True, "use_cache_quantization": False}
_SERVED_WITHOUT = dict.fromkeys(("visual", "audio", "num_key_value_heads"))


def config(hf: RawConfig) -> DecoderConfig:
    heads, hidden_size = required(hf, "num_attention_heads"), required(hf, "hidden_size")
    refuse_unless(hf, _SERVED | _SERVED_WITHOUT)
    if hf.get("kv_channels", hidden_size // heads) * heads != hidden_size:
        needed = f"with {heads} heads it must be {hidden_size // heads}"
        raise ModelError(f"config.json sets kv_channels={hf['kv_channels']}; {needed}")
    trained, longest = required(hf, "seq_length"), required(hf, "max_position_embeddings")
    if hf.get("use_dynamic_ntk") and trained < longest:
        logger.warning(
            "Contexts are limited to the %d tokens of training, not %d: beyond, use_dynamic_ntk would rotate each prompt "
            "by its own length. Set it to false in config.json to go on without.",
            trained,
            longest,
        )
        longest = trained
    has_biases, grows = not hf.get("no_bias", True), hf.get("use_logn_attn", True) and trained < longest
    translated = {
        "intermediate_size": required(hf, "intermediate_size") // 2,  # config.json counts both halves
        "max_position_embeddings": longest,
        "rms_norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "rope_theta": hf.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": hf.get("rotary_pct", 1.0),
    }
    switches = {"qkv_bias": True, "o_bias": has_biases, "mlp_bias": has_biases}
    logn = LognScaling(trained) if grows else None
    return decoder(replaced(hf, translated), num_kv_heads=heads, logn_scaling=logn, **switches)


def eos_token_ids(generation_config: RawConfig) -> tuple[int, ...]:
    """Return tokens that end an answer beside generation_config's eos: a chat model stops at ChatML's marks."""
    return _CHATML_STOPS if generation_config.get("chat_format") == "chatml" else ()
