"""DeepSeek V2 and V3 and models in their layout (Moonlight, Kimi K2): latent attention; dense layers first, then
experts chosen from the best groups, and shared ones. V3 scores experts by sigmoid, with a correction bias that balances
the choice."""

import dataclasses
import functools

import numpy as np

from sgl_jax.models import glm4_moe, llama
from sgl_jax.models.decoder_config import DecoderConfig, MlaConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, refuse_unless, required
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import Rows
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.rope import resolve_rope, yarn_score_scale

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

_MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2 = {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0}
_V3 = {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5}
_V3_CHOSEN = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
DEFAULTS = {
    "DeepseekV2ForCausalLM": _MLA | _V2 | {"first_k_dense_replace": 0, "max_position_embeddings": 2048},
    "DeepseekV3ForCausalLM": _MLA | _V3 | _V3_CHOSEN | {"first_k_dense_replace": 3, "max_position_embeddings": 4096},
}

# Values we serve, where others would change the result. DeepSeek's own V2 code does not scale normalised weights, and
# transformers does not normalise them; no published model asks for it.
_V2_CHOICE = {"scoring_func": "softmax", "topk_method": ("greedy", "group_limited_greedy")}
_SERVED = {
    "DeepseekV2ForCausalLM": dict.fromkeys(("attention_bias", "mlp_bias", "norm_topk_prob"), False) | _V2_CHOICE,
    "DeepseekV3ForCausalLM": {"attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def config(hf: RawConfig) -> DecoderConfig:
    architecture = hf["architectures"][0]
    refuse_unless(hf, _SERVED[architecture])
    mla = MlaConfig(
        kv_lora_rank=required(hf, "kv_lora_rank"),
        q_lora_rank=hf.get("q_lora_rank"),
        qk_nope_head_dim=required(hf, "qk_nope_head_dim"),
        qk_rope_head_dim=required(hf, "qk_rope_head_dim"),
        v_head_dim=required(hf, "v_head_dim"),
        interleaved=bool(hf.get("rope_interleave", True)),
    )
    dense, every = required(hf, "first_k_dense_replace"), hf.get("moe_layer_freq", 1)
    return decoder(
        hf,
        num_kv_heads=1,
        head_dim=mla.head_dim,
        rope=resolve_rope(hf, mla.qk_rope_head_dim),
        query_scale=mla.head_dim**-0.5 * yarn_score_scale(hf),
        mla=mla,
        moe=_experts(hf, is_v3=architecture == "DeepseekV3ForCausalLM"),
        moe_layers=tuple(i >= dense and i % every == 0 for i in range(required(hf, "num_hidden_layers"))),
    )


def _experts(hf: RawConfig, *, is_v3: bool) -> MoeConfig:
    size = required(hf, "moe_intermediate_size")
    grouped = is_v3 or hf.get("topk_method") == "group_limited_greedy"
    experts, groups = required(hf, "n_routed_experts"), required(hf, "n_group") if grouped else 1
    if experts % groups:
        raise ModelError(f"config.json: n_routed_experts={experts} is no multiple of n_group={groups}")
    return MoeConfig(
        num_experts=experts,
        experts_per_token=required(hf, "num_experts_per_tok"),
        intermediate_size=size,
        shared_intermediate_size=size * (hf.get("n_shared_experts") or 0),
        scoring="sigmoid" if is_v3 else "softmax",
        correction_bias=is_v3,
        num_groups=groups,
        groups_per_token=required(hf, "topk_group") if grouped else 1,
        group_score="top2" if is_v3 else "max",
        normalise=is_v3 and bool(hf.get("norm_topk_prob", True)),
        scale=required(hf, "routed_scaling_factor"),
    )


def _rows(c: DecoderConfig, *, weight: str) -> Rows:
    """Return the rows of its stored tensor that a weight takes: the same of every head, rotated ones half-split."""
    m = c.mla
    assert m is not None
    rotated = np.arange(m.qk_rope_head_dim)
    rotated = rotated.reshape(-1, 2).T.reshape(-1) if m.interleaved else rotated
    nope, both = m.qk_nope_head_dim, m.qk_nope_head_dim + m.v_head_dim
    query = (c.num_heads, m.head_dim, np.append(np.arange(nope), nope + rotated))
    heads, stride, rows = {
        "q": query,
        "q_up": query,
        "kv_down": (1, m.latent_dim, np.append(np.arange(m.kv_lora_rank), m.kv_lora_rank + rotated)),
        "k_up": (c.num_heads, both, np.arange(nope)),
        "v_up": (c.num_heads, both, np.arange(nope, both)),
    }[weight]
    return Rows(heads * stride, (np.arange(heads)[:, None] * stride + rows).reshape(-1))


_QUERY = {"q": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
_KEY_VALUE = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "k_up": "kv_b_proj", "v_up": "kv_b_proj"}
_MLA_NAMES = {f"mla.{to}": (f"{llama.ATTENTION}{name}.weight",) for to, name in (_QUERY | _KEY_VALUE).items()}
_REORDERED = ("q", "q_up", "kv_down", "k_up", "v_up")
NAMES = dataclasses.replace(
    glm4_moe.NAMES.with_layer(_MLA_NAMES),
    rows={f"mla.{weight}": functools.partial(_rows, weight=weight) for weight in _REORDERED},
)
