"""DeepSeek V2 and V3 and models in their layout (Moonlight, Kimi K2): latent attention; dense layers first, then experts
chosen from the best groups, and shared ones. V3 scores experts by sigmoid, with a bias that balances the choice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from sgl_jax.models import glm4_moe
from sgl_jax.models.config import DecoderConfig, MlaConfig, MoeConfig
from sgl_jax.models.errors import ModelError
from sgl_jax.models.hf_config import decoder, required
from sgl_jax.models.names import Rows
from sgl_jax.models.rope import resolve_rope, yarn_score_scale

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

# Values we serve, where others would change the result. DeepSeek's own V2 code does not scale normalised weights, and
# transformers does not normalise them; no published model asks for it.
_SERVED: dict[str, dict[str, tuple[Any, ...]]] = {
    "DeepseekV2ForCausalLM": {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    "DeepseekV3ForCausalLM": {
        "attention_bias": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
}


def config(hf: dict[str, Any]) -> DecoderConfig:
    architecture = hf["architectures"][0]
    for key, served in _SERVED[architecture].items():
        if hf.get(key) is not None and hf[key] not in served:
            values = " or ".join(map(repr, served))
            raise ModelError(f"config.json sets {key}={hf[key]!r}; {architecture} is served with {values}")
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
        architecture=architecture,
        num_kv_heads=1,
        head_dim=mla.head_dim,
        rope=resolve_rope(hf, mla.qk_rope_head_dim),
        query_scale=mla.head_dim**-0.5 * yarn_score_scale(hf),
        mla=mla,
        moe=_experts(hf, is_v3=architecture == "DeepseekV3ForCausalLM"),
        moe_layers=tuple(i >= dense and i % every == 0 for i in range(required(hf, "num_hidden_layers"))),
        num_extra_layers=hf.get("num_nextn_predict_layers") or 0,  # multi-token prediction
    )


def _experts(hf: dict[str, Any], *, is_v3: bool) -> MoeConfig:
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
        score_bias=is_v3,
        num_groups=groups,
        groups_per_token=required(hf, "topk_group") if grouped else 1,
        group_score="top2" if is_v3 else "max",
        normalise=is_v3 and bool(hf.get("norm_topk_prob", True)),
        scale=hf.get("routed_scaling_factor", 2.5 if is_v3 else 1.0),
    )


def _latent(c: DecoderConfig) -> MlaConfig:
    assert c.mla is not None
    return c.mla


def _rotated(m: MlaConfig, start: int) -> np.ndarray:
    """The rows of the rotated part, which begins at `start`, in the order of half-split pairs."""
    rows = start + np.arange(m.qk_rope_head_dim)
    return rows.reshape(-1, 2).T.reshape(-1) if m.interleaved else rows


def _of_heads(c: DecoderConfig, rows: np.ndarray, stride: int) -> Rows:
    """These of the `stride` rows of every head."""
    return Rows(c.num_heads * stride, (np.arange(c.num_heads)[:, None] * stride + rows).reshape(-1))


def _queries(c: DecoderConfig) -> Rows:
    m = _latent(c)
    return _of_heads(c, np.append(np.arange(m.qk_nope_head_dim), _rotated(m, m.qk_nope_head_dim)), m.head_dim)


def _keys_and_values(c: DecoderConfig, *, keys: bool) -> Rows:
    m = _latent(c)
    both = np.arange(m.qk_nope_head_dim + m.v_head_dim)
    return _of_heads(c, both[: m.qk_nope_head_dim] if keys else both[m.qk_nope_head_dim :], len(both))


def _compressed(c: DecoderConfig) -> Rows:
    m = _latent(c)
    return Rows(m.latent_dim, np.append(np.arange(m.kv_lora_rank), _rotated(m, m.kv_lora_rank)))


NAMES = dataclasses.replace(
    glm4_moe.NAMES.with_layer(
        {
            "mla.q": ("model.layers.{i}.self_attn.q_proj.weight",),
            "mla.q_down": ("model.layers.{i}.self_attn.q_a_proj.weight",),
            "mla.q_norm": ("model.layers.{i}.self_attn.q_a_layernorm.weight",),
            "mla.q_up": ("model.layers.{i}.self_attn.q_b_proj.weight",),
            "mla.kv_down": ("model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight",),
            "mla.kv_norm": ("model.layers.{i}.self_attn.kv_a_layernorm.weight",),
            "mla.k_up": ("model.layers.{i}.self_attn.kv_b_proj.weight",),
            "mla.v_up": ("model.layers.{i}.self_attn.kv_b_proj.weight",),
        }
    ),
    rows={
        "mla.q": _queries,
        "mla.q_up": _queries,
        "mla.kv_down": _compressed,
        "mla.k_up": functools.partial(_keys_and_values, keys=True),
        "mla.v_up": functools.partial(_keys_and_values, keys=False),
    },
)
