"""GPT-OSS: sinks in every head, a window in every other layer, biases everywhere, a clamped activation.

The experts of a layer are stored together, gate and up rows alternating: in bfloat16 as [E, in, out], or in MXFP4 as
[E, out, in]. Sources: github.com/openai/gpt-oss, gpt_oss/torch/model.py; transformers, models/gpt_oss.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from sgl_jax.models import llama
from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig
from sgl_jax.models.hf_config import decoder, layer_windows, required
from sgl_jax.models.raw_config import RawConfig, replaced
from sgl_jax.models.safetensors_file import DTYPES
from sgl_jax.models.stored import StoredTensor

ARCHITECTURES = ("GptOssForCausalLM",)
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_ATTENTION = {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True}
_MLP = {"swiglu_limit": 7.0, "num_local_experts": 128, "rms_norm_eps": 1e-5}
_ROPE = {"rope_theta": 150000.0, "rope_scaling": _YARN | {"original_max_position_embeddings": 4096}}
DEFAULTS = {"GptOssForCausalLM": _ATTENTION | _MLP | _ROPE | {"max_position_embeddings": 131072}}


def config(hf: RawConfig) -> DecoderConfig:
    layers, bias = required(hf, "num_hidden_layers"), bool(hf["attention_bias"])
    types = hf.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    dense = decoder(
        hf,
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
    """Show the experts' tensors as [E, out, in], gate rows first, then up."""
    tensors = dict(stored)
    for name in stored:
        found = re.fullmatch(r".*\.experts\.(gate_up|down)_proj(_bias)?", name)
        if found is None:
            continue
        kind, is_bias = found.groups()
        if not is_bias and stored[name].dtype in DTYPES:
            if len(stored[name].shape) != 3:
                continue
            e, i, o = stored[name].shape
            turned, label = stored[name].changed(lambda x: x.swapaxes(1, 2)), f"{name} (turned to [E, out, in])"
            tensors[name] = dataclasses.replace(turned, name=label, shape=(e, o, i))
        if kind == "gate_up":
            tensors[name] = _halves_first(tensors[name])
    return tensors


def _halves_first(tensor: StoredTensor) -> StoredTensor:
    """Put the rows of gate, which alternate with those of up, first; in the planes, too."""
    ordered = tensor.changed(lambda x: np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1))
    return dataclasses.replace(ordered, planes={name: _halves_first(plane) for name, plane in tensor.planes.items()})


_EXPERTS = llama.MLP + "experts."
_LAYER = {
    "sinks": (llama.ATTENTION + "sinks",),
    "moe.router": (llama.MLP + "router.weight",),
    "moe.router_bias": (llama.MLP + "router.bias",),
    "moe.experts.gate_up": (_EXPERTS + "gate_up_proj",),
    "moe.experts.gate_up_bias": (_EXPERTS + "gate_up_proj_bias",),
    "moe.experts.down": (_EXPERTS + "down_proj",),
    "moe.experts.down_bias": (_EXPERTS + "down_proj_bias",),
}
NAMES = dataclasses.replace(llama.NAMES.with_layer(_LAYER), view=view)
