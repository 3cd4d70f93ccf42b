"""Qwen 2 and 3 with experts in place of the MLP, in all layers or every few. Qwen 2 has a gated shared expert, too."""

import dataclasses

from sgl_jax.models import llama, qwen2, qwen3
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import qwen_sliding_windows, required, uniform_windows
from sgl_jax.models.raw_config import RawConfig

ARCHITECTURES = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
_QWEN2 = {"num_key_value_heads": 16, "num_local_experts": 60, "num_experts_per_tok": 4}
_QWEN3 = {"num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_QWEN2_SIZES = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
DEFAULTS = {"Qwen2MoeForCausalLM": qwen2.WINDOWS | _QWEN2 | _QWEN2_SIZES, "Qwen3MoeForCausalLM": qwen2.WINDOWS | _QWEN3}
_EXPERT, _SHARED = llama.MLP + "experts.{e}.", llama.MLP + "shared_expert."
NAMES = llama.NAMES.with_layer(
    {
        "moe.router": (llama.MLP + "gate.weight",),
        "moe.experts.gate_up": (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        "moe.experts.down": (_EXPERT + "down_proj.weight",),
        "moe.shared_gate_up": (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"),
        "moe.shared_down": (_SHARED + "down_proj.weight",),
        "moe.shared_gate": (llama.MLP + "shared_expert_gate.weight",),
    }
)


def config(hf: RawConfig) -> DecoderConfig:
    is_qwen2 = hf["architectures"][0] == "Qwen2MoeForCausalLM"
    dense = (qwen2 if is_qwen2 else qwen3).config(hf)
    step, without = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
    return dataclasses.replace(
        dense,
        sliding_windows=_windows(hf, is_qwen2),
        qkv_bias=bool(hf.get("qkv_bias", True)) if is_qwen2 else dense.qkv_bias,
        moe=MoeConfig(
            num_experts=hf.get("num_experts") or required(hf, "num_local_experts"),  # transformers 5 writes the latter
            experts_per_token=required(hf, "num_experts_per_tok"),
            intermediate_size=required(hf, "moe_intermediate_size"),
            shared_intermediate_size=required(hf, "shared_expert_intermediate_size") if is_qwen2 else 0,
            shared_gate=is_qwen2,
            normalise=bool(hf.get("norm_topk_prob", False)),
        ),
        moe_layers=tuple(i not in without and (i + 1) % step == 0 for i in range(dense.num_layers)),
    )


def _windows(hf: RawConfig, is_qwen2: bool) -> tuple[int | None, ...] | None:
    """Unlike the dense models', Qwen 2's windows are in every other of the first layers, Qwen 3's in all layers."""
    windows = qwen_sliding_windows(hf)
    if windows is None or (is_qwen2 and hf.get("layer_types") is not None):
        return windows
    if not is_qwen2:
        return uniform_windows(hf)
    window, end = hf["sliding_window"], hf["max_window_layers"]
    return tuple(window if i % 2 == 0 and i < end else None for i in range(len(windows)))
