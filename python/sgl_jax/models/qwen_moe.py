"""Qwen 2 and 3 with experts in place of the MLP, in all layers or every few; Qwen 2's also have a gated shared expert."""

from __future__ import annotations

import dataclasses

from sgl_jax.models import llama, qwen2, qwen3
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import qwen_sliding_windows, required
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
DEFAULTS = {
    "Qwen2MoeForCausalLM": {
        **{"num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        **{"num_local_experts": 60, "num_experts_per_tok": 4} | _WINDOWS,
    },
    "Qwen3MoeForCausalLM": {
        **{"num_key_value_heads": 4, "moe_intermediate_size": 768},
        **{"num_local_experts": 128, "num_experts_per_tok": 8} | _WINDOWS,
    },
}
NAMES = llama.NAMES.with_layer(
    {
        "moe.router": ("model.layers.{i}.mlp.gate.weight",),
        "moe.experts.gate_up": (
            "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
            "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
        ),
        "moe.experts.down": ("model.layers.{i}.mlp.experts.{e}.down_proj.weight",),
        "moe.shared_gate_up": (
            "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
            "model.layers.{i}.mlp.shared_expert.up_proj.weight",
        ),
        "moe.shared_down": ("model.layers.{i}.mlp.shared_expert.down_proj.weight",),
        "moe.shared_gate": ("model.layers.{i}.mlp.shared_expert_gate.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    architecture = hf["architectures"][0]
    is_qwen2 = architecture == "Qwen2MoeForCausalLM"
    dense = (qwen2 if is_qwen2 else qwen3).config(hf)
    shared = required(hf, "shared_expert_intermediate_size") if is_qwen2 else 0
    step, without = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
    return dataclasses.replace(
        dense,
        architecture=architecture,
        sliding_windows=_windows(hf, is_qwen2),
        qkv_bias=bool(hf.get("qkv_bias", True)) if is_qwen2 else dense.qkv_bias,
        moe=MoeConfig(
            num_experts=hf.get("num_experts") or required(hf, "num_local_experts"),  # transformers 5 writes the latter
            experts_per_token=required(hf, "num_experts_per_tok"),
            intermediate_size=required(hf, "moe_intermediate_size"),
            shared_intermediate_size=shared,
            shared_gate=is_qwen2,
            normalise=bool(hf.get("norm_topk_prob", False)),
        ),
        moe_layers=tuple(i not in without and (i + 1) % step == 0 for i in range(dense.num_layers)),
    )


def _windows(hf: RawConfig, is_qwen2: bool) -> tuple[int | None, ...] | None:
    """Unlike the dense models': Qwen 2 has windows in every other of the first layers, Qwen 3 in all."""
    windows, layers = qwen_sliding_windows(hf), required(hf, "num_hidden_layers")
    if windows is None or (is_qwen2 and hf.get("layer_types") is not None):
        return windows
    window = hf["sliding_window"]
    if not is_qwen2:
        return (window,) * layers
    return tuple(window if i % 2 == 0 and i < hf["max_window_layers"] else None for i in range(layers))
