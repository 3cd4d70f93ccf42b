"""GPT-OSS: sinks in every head, a window in every other layer, biases everywhere, a clamped activation.

The experts of a layer are stored together, gate and up rows alternating: in bfloat16 as [E, in, out], or in MXFP4 as
[E, out, in]. Sources: github.com/openai/gpt-oss, gpt_oss/torch/model.py; transformers, models/gpt_oss.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, kv_heads, layer_windows, required
from sgl_jax.models.mxfp4 import stored_mxfp4
from sgl_jax.models.raw_config import RawConfig, replaced, without
from sgl_jax.models.stored import StoredTensor

ARCHITECTURES = ("GptOssForCausalLM",)
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
DEFAULTS = {
    "GptOssForCausalLM": {
        **{
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
            "swiglu_limit": 7.0,
        },
        **{"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "max_position_embeddings": 131072, "num_local_experts": 128},
        "rope_scaling": _YARN | {"original_max_position_embeddings": 4096},
    }
}
_EXPERTS = "model.layers.{i}.mlp.experts."


def config(hf: RawConfig) -> DecoderConfig:
    layers, bias = required(hf, "num_hidden_layers"), bool(hf["attention_bias"])
    types = hf.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    is_mxfp4 = (hf.get("quantization_config") or {}).get("quant_method") == "mxfp4"  # the tensors themselves tell
    dense = decoder(
        without(hf, "quantization_config") if is_mxfp4 else hf,
        architecture="GptOssForCausalLM",
        num_kv_heads=kv_heads(hf),
        head_dim=required(hf, "head_dim"),
        sliding_windows=layer_windows(replaced(hf, {"layer_types": types}), required(hf, "sliding_window")),
        qkv_bias=bias,
        o_bias=bias,
        attn_sinks=True,
        gate_limit=hf["swiglu_limit"],
        moe=MoeConfig(
            num_experts=required(hf, "num_local_experts"),
            experts_per_token=hf.get("num_experts_per_tok") or hf.get("experts_per_token", 4),
            intermediate_size=required(hf, "intermediate_size"),
            router_bias=True,
            bias=True,
        ),
    )
    return dataclasses.replace(dense, activation="swiglu_oai")


def view(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The experts' tensors as [E, out, in], gate rows first, then up."""
    tensors = dict(stored)
    for name in stored:
        found = re.fullmatch(r"(.*\.experts\.(gate_up|down)_proj)(_blocks|_bias)?", name)
        if found is None:
            continue
        base, kind, suffix = found.groups()
        halves = _halves_first if kind == "gate_up" else _as_they_are
        if suffix == "_blocks":
            if f"{base}_scales" in stored and base not in stored:
                blocks, scales = tensors.pop(name), tensors.pop(f"{base}_scales")
                tensors[base] = _turned(stored_mxfp4(f"{base}_blocks", blocks, scales), halves)
        elif suffix == "_bias":
            tensors[name] = _turned(stored[name], halves)
        elif len(stored[name].shape) == 3:
            tensors[name] = _turned(stored[name], lambda x, halves=halves: halves(x.swapaxes(1, 2)), swapped=True)
    return tensors


def _halves_first(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)


def _as_they_are(x: np.ndarray) -> np.ndarray:
    return x


def _turned(tensor: StoredTensor, turn: Callable[[np.ndarray], np.ndarray], *, swapped: bool = False) -> StoredTensor:
    """Apply `turn` to each slice of experts, and to the planes' slices alike; `swapped` says that it changes the two axes of
    the matrices."""

    def rows(start: int, stop: int) -> np.ndarray:
        return turn(tensor.rows(start, stop))

    if not swapped:
        planes = {name: _turned(plane, turn) for name, plane in tensor.planes.items()}
        return dataclasses.replace(tensor, rows=rows, planes=planes)
    e, i, o = tensor.shape
    return dataclasses.replace(
        tensor, name=f"{tensor.name} (turned to [E, out, in])", shape=(e, o, i), rows=rows, planes={}
    )


NAMES = dataclasses.replace(
    llama.NAMES.with_layer(
        {
            "sinks": ("model.layers.{i}.self_attn.sinks",),
            "moe.router": ("model.layers.{i}.mlp.router.weight",),
            "moe.router_bias": ("model.layers.{i}.mlp.router.bias",),
            "moe.experts.gate_up": (_EXPERTS + "gate_up_proj",),
            "moe.experts.gate_up_bias": (_EXPERTS + "gate_up_proj_bias",),
            "moe.experts.down": (_EXPERTS + "down_proj",),
            "moe.experts.down_bias": (_EXPERTS + "down_proj_bias",),
        }
    ),
    view=view,
)
