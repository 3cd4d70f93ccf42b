"""Translates a GGUF file to a Hugging Face checkpoint: the config, the tensor names and the order of rows.

Sources: llama.cpp `gguf-py/gguf/constants.py` (keys, names) and `convert_hf_to_gguf.py` (what was done to the weights).
"""

import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from sgl_jax.models.gguf_file import GgufFile, GgufTensor
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length")
# Every `<architecture>.*` key that is read below or cannot change the result; any other one is refused.
_ATTENTION = ("head_count", "head_count_kv", "key_length", "value_length", "layer_norm_rms_epsilon")
_ROPE = {"rope.freq_base", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"}
_YARN = ("original_context_length", "finetuned", "attn_factor", "yarn_beta_fast", "yarn_beta_slow")
_KNOWN_KEYS = (
    {*_SIZES, "vocab_size", "tensor_data_layout", "pooling_type"}
    | {f"attention.{key}" for key in _ATTENTION}
    | _ROPE
    | {f"rope.scaling.{key}" for key in _YARN}
)
_HARMLESS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
_POOLING = {None: None, 0: None, 1: "mean", 3: "lasttoken"}  # by pooling_type, under sentence-transformers' names
_NEEDED_KEYS = (*_SIZES, "attention.head_count")
_OPTIONAL_COUNTS = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count")

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # becomes part of the config
_PLAIN_TYPES = {0: ("F32", np.dtype("f4")), 1: ("F16", np.dtype("f2")), 30: ("BF16", np.dtype(ml_dtypes.bfloat16))}


def gguf_config(file: GgufFile) -> RawConfig:
    """Return the config.json that this model would have had. Raises ModelError for what is not served."""
    arch = file.get("general.architecture", str)
    if arch not in _ARCHITECTURES:
        raise ModelError(f"{file.path} has architecture {arch!r}; supported GGUF ones are {', '.join(_ARCHITECTURES)}")
    prefix = f"{arch}."
    meta = {k.removeprefix(prefix): _shortest(v) for k, v in file.metadata.items() if k.startswith(prefix)}
    _refuse_unknown(file, arch, meta)
    num_heads = meta["attention.head_count"]
    head_dim = meta.get("attention.key_length") or meta["embedding_length"] // num_heads
    eos = [file.get(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("eos", "eot", "eom")]
    config = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": list(dict.fromkeys(i for i in eos if i is not None)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "max_position_embeddings": meta["context_length"],
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "num_attention_heads": num_heads,
        "num_hidden_layers": meta["block_count"],
        "num_key_value_heads": meta.get("attention.head_count_kv", num_heads),
        "gguf_pooling": _POOLING[meta.get("pooling_type")],
        "partial_rotary_factor": meta.get("rope.dimension_count", head_dim) / head_dim,
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_scaling": _rope_scaling(file, meta),
        "rope_theta": meta.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _matrix_dtype(file),
        "use_sliding_window": False,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
    }
    return RawConfig(config)


def _refuse_unknown(file: GgufFile, arch: str, meta: dict[str, Any]) -> None:
    refused = {k: v for k, v in meta.items() if k not in _KNOWN_KEYS and not (k in _HARMLESS and v == _HARMLESS[k])}
    if refused:
        listed = ", ".join(f"{arch}.{k}={v!r}" for k, v in sorted(refused.items()))
        raise ModelError(f"{file.path} sets {listed}; this is not supported for GGUF models of this architecture")
    if (pooling := meta.get("pooling_type")) not in _POOLING:
        served = "1, the mean of all tokens, and 3, the last token"
        raise ModelError(f"{file.path} has {arch}.pooling_type {pooling!r}; vectors are made by {served}")
    missing = [f"{arch}.{k}" for k in (*_NEEDED_KEYS, "attention.layer_norm_rms_epsilon") if k not in meta]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if missing:
        raise ModelError(f"{file.path} lacks {', '.join(missing)}; it is not a complete model")
    per_layer = [f"{arch}.{k}" for k in ("feed_forward_length", "attention.head_count") if isinstance(meta[k], list)]
    if per_layer or isinstance(meta.get("attention.head_count_kv"), list):
        raise ModelError(f"{file.path} gives head counts or feed-forward sizes per layer; layers must be alike")
    counts = [k for k in (*_NEEDED_KEYS, *_OPTIONAL_COUNTS) if not isinstance(v := meta.get(k, 1), int) or v < 1]
    if counts:
        listed = ", ".join(f"{arch}.{k}={meta[k]!r}" for k in counts)
        raise ModelError(f"{file.path} sets {listed}; each must be an integer of at least 1")
    key_length = meta.get("attention.key_length")
    if meta.get("attention.value_length", key_length) != key_length:
        raise ModelError(f"{file.path}: {arch}.attention.value_length differs from key_length {key_length}")


def _rope_scaling(file: GgufFile, meta: dict[str, Any]) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type", "linear" if "rope.scale_linear" in meta else "none")
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear"))
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise ModelError(f"{file.path} has both {_ROPE_FACTORS} and rope scaling {kind!r}; only one is supported")
        factors = _stored(file, file.tensors[_ROPE_FACTORS], _ROPE_FACTORS).read()
        return {"rope_type": "gguf_factors", "factors": factors.tolist()}
    if kind == "none":
        return None
    if kind != "yarn":
        return {"rope_type": kind, "factor": factor}
    attn_factor = meta.get("rope.scaling.attn_factor")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.get("rope.scaling.original_context_length"),
        "beta_fast": meta.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": meta.get("rope.scaling.yarn_beta_slow"),
        # llama.cpp multiplies its factor by the paper's
        "attention_factor": attn_factor and attn_factor * (0.1 * math.log(factor) + 1.0),
    }
    return {k: v for k, v in scaling.items() if v is not None}


def gguf_tensors(file: GgufFile) -> dict[str, StoredTensor]:
    """Return the tensors under their Hugging Face names. A name without translation is kept, and so reported later."""
    arch = file.get("general.architecture", str)
    heads = file.get(f"{arch}.attention.head_count", int) or 0
    kv_heads = file.get(f"{arch}.attention.head_count_kv", int) or heads
    per_head = {"attn_q": heads, "attn_k": kv_heads} if arch == "llama" else {}
    tensors = {}
    for tensor in file.tensors.values():
        if tensor.name != _ROPE_FACTORS:
            name, kind = _translate(tensor.name)
            tensors[name] = _stored(file, tensor, name)
            if kind in per_head:
                tensors[name] = tensors[name].take(_half_split_order(tensor.shape[0], per_head[kind]))
    return tensors


def _translate(name: str) -> tuple[str, str]:
    """Return the Hugging Face name and llama.cpp's kind of tensor."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, kind, suffix = match.groups()
        return (f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.{suffix}" if kind in _LAYER_TENSORS else name), kind
    kind, _, suffix = name.partition(".")
    return (f"{_TENSORS[kind]}.{suffix}" if kind in _TENSORS else name), kind


def _half_split_order(num_rows: int, num_heads: int) -> np.ndarray:
    """Return `order`: row i of the Hugging Face matrix is row order[i] of the file's.

    llama.cpp stores the rows of a `llama` model's q and k so that rope turns neighbours; ours turns half-split pairs.
    """
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _stored(file: GgufFile, tensor: GgufTensor, name: str) -> StoredTensor:
    shape = tensor.shape
    if tensor.type in _PLAIN_TYPES:
        label, dtype = _PLAIN_TYPES[tensor.type]
        block_values, block_bytes, dequantize = 1, dtype.itemsize, lambda rows: rows
    else:
        label, block_values, block_bytes, dequantize = _quantised_type(file, tensor)
        dtype = np.dtype(np.uint8)
    if shape[-1] % block_values:
        raise ModelError(f"{file.path}: {tensor.name} has rows of {shape[-1]}, no multiple of {label}'s {block_values}")
    nbytes = math.prod(shape) // block_values * block_bytes
    if tensor.offset + nbytes > file.data.size:
        raise ModelError(
            f"{file.path} is cut short: {tensor.name} ends at byte {tensor.offset + nbytes}, the file has "
            f"{file.data.size}; download it again"
        )
    stored = file.data[tensor.offset : tensor.offset + nbytes].view(dtype)
    stored = stored.reshape(*shape[:-1], -1) if len(shape) > 1 else stored.reshape(shape[0] // block_values, -1)

    def rows(start: int, stop: int) -> np.ndarray:
        if len(shape) == 1:  # a row of blocks
            return dequantize(stored).reshape(shape)[start:stop]
        return dequantize(stored[start:stop])

    return StoredTensor(name, shape, label, nbytes, rows)


def _quantised_type(file: GgufFile, tensor: GgufTensor) -> tuple[str, int, int, Any]:
    """Return the format's name, values and bytes per block, and a function from rows of bytes to rows of float32."""
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    label = {int(kind): kind.name for kind in GGMLQuantizationType}.get(tensor.type, str(tensor.type))
    quant = getattr(quants, label, None)
    if quant is None or not hasattr(quant, "dequantize_rows"):
        raise ModelError(f"{file.path}: {tensor.name} is stored as {label}, which cannot be dequantised here")
    quant.init_grid()
    return label, *GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)], quant.dequantize_rows


def _matrix_dtype(file: GgufFile) -> str:
    """Return the dtype that keeps the weights: float32 or float16 where a matrix is stored so, else bfloat16."""
    types = {t.type for t in file.tensors.values() if len(t.shape) > 1}
    return "float32" if types == {0} else "float16" if types <= {0, 1} else "bfloat16"


def _shortest(value: Any) -> Any:
    """Return float32 metadata as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
