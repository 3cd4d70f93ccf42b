"""Grok-2: norms around both halves of a layer, an MLP beside the experts, soft caps on scores, router and logits.

Sources: github.com/sgl-project/sglang, python/sglang/srt/models/grok.py, which the release names for serving it; the
activation is that of github.com/xai-org/grok-1, model.py. The weights come as eight devices saved them, each its shard
of the experts.
"""

import dataclasses
import re
from collections.abc import Mapping

from sgl_jax.models import llama, mixtral
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, refuse_unless, required
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig, replaced
from sgl_jax.models.stored import StoredTensor, concatenated, shard_name

ARCHITECTURES = ("Grok1ForCausalLM",)
_EOS = 2  # where config.json has none (sglang, python/sglang/srt/tokenizer/tiktoken_tokenizer.py)

# Keys that change the result, and the values with which they do not change what is built here. rope_type "original" is
# plain rope: rope_theta is stretched already (1e6 ** (log(16 * 8192 / 2 pi) / log(8192 / 2 pi)) = 208533496).
_SERVED = {
    "rope_type": "original",
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
    "attn_logit_softcapping_method": "tanh",
    "moe_router_renormalize": False,
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
}


def config(hf: RawConfig) -> DecoderConfig:
    refuse_unless(hf, _SERVED)
    temperature = hf.get("attn_temperature_len", -1)
    if temperature == 1:
        raise ModelError("config.json sets attn_temperature_len=1, whose logarithm is 0; it must be more, or negative")
    rotated = 0.5 if hf.get("rope_rotate_half_dims") else 1.0
    return decoder(
        replaced(hf, {"eos_token_id": hf.get("eos_token_id", _EOS), "partial_rotary_factor": rotated}),
        num_kv_heads=required(hf, "num_key_value_heads"),
        head_dim=hf.get("head_dim", 128),
        hidden_act="gelu_pytorch_tanh",
        sandwich_norms=True,
        embed_scale=required(hf, "embedding_multiplier_scale"),
        logit_scale=required(hf, "output_multiplier_scale"),
        attn_logit_softcap=_cap(hf, "attn_logit_softcapping", 30.0),
        attn_temperature_length=temperature if temperature > 0 else None,
        final_logit_softcap=_cap(hf, "final_logit_softcapping", 0.0),
        moe=MoeConfig(
            num_experts=required(hf, "num_local_experts"),
            experts_per_token=required(hf, "num_experts_per_tok"),
            intermediate_size=hf.get("moe_intermediate_size") or required(hf, "intermediate_size"),
            router_softcap=_cap(hf, "router_logit_softcapping", 30.0),
            normalise=False,
            residual_scale=0.5**0.5 if hf.get("residual_moe") else None,
        ),
    )


def _cap(hf: RawConfig, key: str, absent: float) -> float | None:
    value = hf.get(key, absent)
    return float(value) if value and value > 0 else None


def view(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Put the shards of each expert's matrices together: w1 and w3 are divided by rows, w2 by columns."""
    tensors = dict(stored)
    for first in stored:
        found = re.fullmatch(r"(.*\.experts\.\d+\.(w[123])\.weight) \(shard 0\)", first)
        if found is None:
            continue
        name, kind = found.groups()
        parts = []
        while shard_name(name, len(parts)) in tensors:
            parts.append(tensors.pop(shard_name(name, len(parts))))
        tensors[name] = concatenated(name, parts, axis=1 if kind == "w2" else 0)
    return tensors


_NORMS = {
    "attn_norm": (llama.LAYER + "pre_attn_norm.weight",),
    "post_attn_norm": (llama.LAYER + "post_attn_norm.weight",),
    "mlp_norm": (llama.LAYER + "pre_moe_norm.weight",),
    "post_mlp_norm": (llama.LAYER + "post_moe_norm.weight",),
}
NAMES = dataclasses.replace(mixtral.NAMES.with_layer(_NORMS), view=view)
