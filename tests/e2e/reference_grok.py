"""Grok-2 in plain numpy, float64, a function for each published formula. Shares no code with the package.

Sources, unless a function names another: xai-org/grok-2's config.json for the names of the numbers, and
github.com/sgl-project/sglang, python/sglang/srt/models/grok.py (the code the release is to be served with) for the order
of operations.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHARES = 8  # devices that saved the published checkpoint, each with its shard of the experts

CONFIG = {
    "architectures": ["Grok1ForCausalLM"],
    "model_type": "git",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "residual_moe": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 208533496,
    "rope_type": "original",
    "original_max_position_embeddings": 16,
    "scaling_factor": 16.0,
    "extrapolation_factor": 1.0,
    "attn_factor": 1.0,
    "beta_fast": 8,
    "beta_slow": 1,
    "embedding_multiplier_scale": 5.656854249492381,
    "output_multiplier_scale": 0.5,
    "attn_logit_softcapping": 2.0,
    "router_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
    "attn_temperature_len": 12,
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
    "torch_dtype": "bfloat16",
}


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap); Gemma 2's report, section 2, has the formula in words."""
    return cap * np.tanh(x / cap)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zhang & Sennrich 2019, equation 4."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form, which jax.nn.gelu of github.com/xai-org/grok-1, model.py is by default (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """x [T, heads, H] at positions 0, 1, …: pair (i, i + H/2) turns by position * theta ** (-2i / H) (Su et al. 2021,
    in the order of GPT-NeoX). rope_type "original" of sglang's ScalingRotaryEmbedding leaves theta as it is."""
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    for position in range(len(x)):
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[-1])
            a, b = x[position, :, i], x[position, :, half + i]
            out[position, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[position, :, half + i] = b * np.cos(angle) + a * np.sin(angle)
    return out


def temperature(position: int, length: int) -> float:
    """sglang, python/sglang/srt/layers/attention/triton_ops/decode_attention.py: xai_temperature_reg, which multiplies
    the capped scores."""
    return np.log2(position) / np.log2(length) if position > length else 1.0


def attention(h: np.ndarray, w: dict[str, np.ndarray], c: dict) -> np.ndarray:
    heads, kv_heads, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q = rotate((h @ w["self_attn.q_proj"].T).reshape(-1, heads, size), c["rope_theta"])
    k = rotate((h @ w["self_attn.k_proj"].T).reshape(-1, kv_heads, size), c["rope_theta"])
    v = (h @ w["self_attn.v_proj"].T).reshape(-1, kv_heads, size)
    out = np.zeros_like(q)
    for t in range(len(h)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = softcap(k[: t + 1, group] @ q[t, head] / np.sqrt(size), c["attn_logit_softcapping"])
            weights = np.exp(scores * temperature(t, c["attn_temperature_len"]))
            out[t, head] = weights / weights.sum() @ v[: t + 1, group]
    return out.reshape(len(h), -1) @ w["self_attn.o_proj"].T


def mlp(h: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (gelu(h @ gate.T) * (h @ up.T)) @ down.T


def experts(h: np.ndarray, w: dict[str, np.ndarray], c: dict) -> np.ndarray:
    """Routing as in sglang, python/sglang/srt/layers/moe/router.py: softmax over the capped logits of all experts; the
    weights of the chosen are not made to sum to 1."""
    out = np.zeros_like(h)
    for t in range(len(h)):
        logits = softcap(w["block_sparse_moe.gate"] @ h[t], c["router_logit_softcapping"])
        shares = np.exp(logits) / np.exp(logits).sum()
        for e in np.argsort(-logits)[: c["num_experts_per_tok"]]:
            matrices = (w[f"block_sparse_moe.experts.{e}.{name}"] for name in ("w1", "w3", "w2"))
            out[t] += shares[e] * mlp(h[t : t + 1], *matrices)[0]
    return out


def logits(tensors: dict[str, np.ndarray], tokens: list[int], c: dict) -> np.ndarray:
    """Compute the logits after each token, [T, V]."""
    eps = c["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][tokens] * c["embedding_multiplier_scale"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w = {n.removeprefix(prefix).removesuffix(".weight"): x for n, x in tensors.items() if n.startswith(prefix)}
        h = attention(rms_norm(x, w["pre_attn_norm"], eps), w, c)
        x = x + rms_norm(h, w["post_attn_norm"], eps)
        h = rms_norm(x, w["pre_moe_norm"], eps)
        both = mlp(h, w["mlp.gate_proj"], w["mlp.up_proj"], w["mlp.down_proj"]) + experts(h, w, c)
        x = x + rms_norm(both / np.sqrt(2), w["post_moe_norm"], eps)
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return softcap(x @ tensors["lm_head.weight"].T * c["output_multiplier_scale"], c["final_logit_softcapping"])


def random_tensors(c: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Make random tensors, exact in bfloat16 and large enough that every cap changes the values it caps."""
    rng = np.random.default_rng(seed)
    d, f, e = c["hidden_size"], c["intermediate_size"], c["moe_intermediate_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    shapes = {"model.embed_tokens": (c["vocab_size"], d), "lm_head": (c["vocab_size"], d), "model.norm": (d,)}
    for layer in range(c["num_hidden_layers"]):
        of_layer = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        of_layer |= {"self_attn.o_proj": (d, q), "block_sparse_moe.gate": (c["num_local_experts"], d)}
        of_layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        of_layer |= {f"{a}_{b}_norm": (d,) for a in ("pre", "post") for b in ("attn", "moe")}
        for i in range(c["num_local_experts"]):
            of_layer |= {f"block_sparse_moe.experts.{i}.{n}": (e, d) for n in ("w1", "w3")}
            of_layer[f"block_sparse_moe.experts.{i}.w2"] = (d, e)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        values = 1 + 0.2 * values if len(shape) == 1 else values * (2.0 / np.sqrt(shape[1]))
        tensors[f"{name}.weight"] = values.astype(ml_dtypes.bfloat16).astype(np.float64)
    return tensors


def save(folder: Path, c: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Write a checkpoint in the published layout: one file for each kind of replicated tensor, and the experts in eight files
    with the same names, w1 and w3 sharded by rows and w2 by columns."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(c))
    stored = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    common = {name: x for name, x in stored.items() if ".experts." not in name}
    save_file(common, folder / "pytorch_model-00000-TP-common.safetensors")
    for file, kind in enumerate(("w1", "w2", "w3"), start=6):
        for share in range(SHARES):
            shares = {
                name: np.ascontiguousarray(np.split(x, SHARES, axis=1 if kind == "w2" else 0)[share])
                for name, x in stored.items()
                if name.endswith(f".{kind}.weight")
            }
            save_file(shares, folder / f"pytorch_model-{file:05d}-TP-{share:03d}.safetensors")
    return folder


def logprobs(tensors: dict[str, np.ndarray], c: dict, tokens: list[int]) -> np.ndarray:
    """Compute the log probability of every token at each position, [T, V]."""
    x = logits(tensors, tokens, c)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
