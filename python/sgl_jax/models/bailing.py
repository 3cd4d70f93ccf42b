"""Bailing, of which Ling and Ring are made: q, k and v fused, dense layers first, then experts and a shared one.

The first version routes by softmax. The second routes by sigmoid scores with a correction bias, within the best groups;
it norms each head of q and k and rotates half of it. Sources: modeling_bailing_moe.py and modeling_bailing_moe_v2.py of
the models.
"""

import dataclasses

from sgl_jax.models import glm4_moe, llama
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, refuse_unless, required
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig, replaced

ARCHITECTURES = ("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM")
_ATTENTION = llama.LAYER + "attention."
NAMES = dataclasses.replace(glm4_moe.NAMES, embed="model.word_embeddings.weight").with_layer(
    {
        "qkv": (_ATTENTION + "query_key_value.weight",),
        "qkv_bias": (_ATTENTION + "query_key_value.bias",),
        "q_norm": (_ATTENTION + "query_layernorm.weight",),
        "k_norm": (_ATTENTION + "key_layernorm.weight",),
        "o": (_ATTENTION + "dense.weight",),
        "o_bias": (_ATTENTION + "dense.bias",),
        "moe.score_bias": (llama.MLP + "gate.expert_bias",),
    }
)
_SERVED_WITHOUT = dict.fromkeys(("multi_gate", "norm_softmax", "use_sliding_window"), False)
_SERVED = _SERVED_WITHOUT | dict.fromkeys(("use_rmsnorm", "moe_router_enable_shared_expert"), True)


def config(hf: RawConfig) -> DecoderConfig:
    architecture, layers = hf["architectures"][0], required(hf, "num_hidden_layers")
    is_v2 = architecture == "BailingMoeV2ForCausalLM"
    scoring = "sigmoid" if is_v2 else "softmax"
    refuse_unless(hf, _SERVED | {"score_function": scoring} | ({"norm_topk_prob": True} if is_v2 else {}))
    if not is_v2 and (hf.get("n_group") or 1) > 1:
        raise ModelError(f"config.json sets n_group={hf['n_group']}; {architecture} routes without groups")
    shared_size = hf.get("moe_shared_expert_intermediate_size") or required(hf, "moe_intermediate_size")
    normalised_head = bool(hf.get("norm_head", False))
    if normalised_head and hf.get("tie_word_embeddings"):
        raise ModelError("config.json sets both norm_head and tie_word_embeddings; a tied head is served as it is")
    head_dim = hf.get("head_dim") or required(hf, "hidden_size") // required(hf, "num_attention_heads")
    dense, per_token = hf.get("first_k_dense_replace") or 0, required(hf, "num_experts_per_tok")
    return decoder(
        replaced(hf, {"partial_rotary_factor": _rotated(hf, head_dim, 0.5 if is_v2 else 1.0)}),
        head_dim=head_dim,
        qkv_bias=bool(hf.get("use_qkv_bias", False)),
        o_bias=bool(hf.get("use_bias", True)),
        qk_norm=bool(hf.get("use_qk_norm", False)),
        normalised_head=normalised_head,
        moe=MoeConfig(
            num_experts=required(hf, "num_experts"),
            experts_per_token=per_token,
            intermediate_size=required(hf, "moe_intermediate_size"),
            shared_intermediate_size=(hf.get("num_shared_experts") or 0) * shared_size,
            scoring=scoring,
            correction_bias=is_v2 and bool(hf.get("moe_router_enable_expert_bias", True)),
            num_groups=required(hf, "n_group") if is_v2 else 1,
            groups_per_token=required(hf, "topk_group") if is_v2 else 1,
            group_score="top2",
            normalise=per_token > 1 and (is_v2 or bool(hf.get("norm_topk_prob"))),
            scale=hf.get("routed_scaling_factor", 1.0) if is_v2 else 1.0,
        ),
        moe_layers=tuple(i >= dense for i in range(layers)),
    )


def _rotated(hf: RawConfig, head_dim: int, usual: float) -> float:
    """Return the part of each head that is rotated. Raises ModelError where two keys give it differently."""
    rotary_dim, factor = hf.get("rotary_dim"), hf.get("partial_rotary_factor")
    if factor is None:
        return usual if rotary_dim is None else rotary_dim / head_dim
    if rotary_dim is not None and rotary_dim != int(head_dim * factor):
        raise ModelError(
            f"config.json: rotary_dim={rotary_dim} and partial_rotary_factor={factor} of {head_dim} contradict each other"
        )
    return factor
