"""GLM-4.5 and 4.6: dense layers first, then experts chosen by sigmoid scores with a correction bias, and a shared
expert; half of each head is rotated."""

from sgl_jax.models import llama, qwen_moe
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, required
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Glm4MoeForCausalLM",)
_DENSE = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1}
_ROUTED = {"moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8}
DEFAULTS = {"Glm4MoeForCausalLM": _DENSE | _ROUTED | {"n_shared_experts": 1, "max_position_embeddings": 131072}}
_SHARED = llama.MLP + "shared_experts."
NAMES = qwen_moe.NAMES.with_layer(
    {
        "moe.score_bias": (llama.MLP + "gate.e_score_correction_bias",),
        "moe.shared_gate_up": (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"),
        "moe.shared_down": (_SHARED + "down_proj.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    layers, dense = required(hf, "num_hidden_layers"), required(hf, "first_k_dense_replace")
    expert_size = required(hf, "moe_intermediate_size")
    return decoder(
        hf,
        qkv_bias=bool(hf.get("attention_bias", False)),
        qk_norm=bool(hf.get("use_qk_norm", False)),
        moe=MoeConfig(
            num_experts=required(hf, "n_routed_experts"),
            experts_per_token=required(hf, "num_experts_per_tok"),
            intermediate_size=expert_size,
            shared_intermediate_size=expert_size * required(hf, "n_shared_experts"),
            scoring="sigmoid",
            correction_bias=True,
            num_groups=hf.get("n_group", 1),
            groups_per_token=hf.get("topk_group", 1),
            group_score="top2",
            normalise=bool(hf.get("norm_topk_prob", True)),
            scale=hf.get("routed_scaling_factor", 1.0),
        ),
        moe_layers=tuple(i >= dense for i in range(layers)),
    )
