"""Qwen 1 in numpy, float64, a function for each formula of modeling_qwen.py (Qwen/Qwen-7B-Chat). Slow and plain: every
token is computed again for each new one. Shares no code with the package."""

from __future__ import annotations

import math

import numpy as np

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_channels": 16,
    "intermediate_size": 160,  # both halves together
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 128,
    "seq_length": 128,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def checkpoint(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Make random tensors, under the names of the family's own files."""
    rng = np.random.default_rng(seed)
    d, half, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2 / math.sqrt(shape[-1])).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(d)).astype(np.float32)

    tensors = {
        "transformer.wte.weight": matrix(vocab, d),
        "transformer.ln_f.weight": norm(),
        "lm_head.weight": matrix(vocab, d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "ln_1.weight": norm(),
            "attn.c_attn.weight": matrix(3 * d, d),
            "attn.c_attn.bias": matrix(3 * d, 1)[:, 0] * np.float32(0.2),
            "attn.c_proj.weight": matrix(d, d),
            "ln_2.weight": norm(),
            "mlp.w1.weight": matrix(half, d),
            "mlp.w2.weight": matrix(half, d),
            "mlp.c_proj.weight": matrix(d, half),
        }
        tensors |= {f"transformer.h.{i}.{name}": value for name, value in layer.items()}
    return tensors


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm.forward."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotary_angles(config: dict, length: int) -> np.ndarray:
    """RotaryEmbedding with ntk_alpha 1: one angle for each position and pair."""
    dim = int(config["kv_channels"] * config["rotary_pct"])
    inv_freq = 1.0 / config["rotary_emb_base"] ** (np.arange(0, dim, 2) / dim)
    return np.outer(np.arange(length), inv_freq)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """apply_rotary_pos_emb; x [tokens, heads, channels]. _rotate_half pairs the first half with the second."""
    dim = 2 * angles.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    a, b = np.split(turned, 2, axis=-1)
    return np.concatenate([turned * cos + np.concatenate([-b, a], -1) * sin, rest], -1)


def logn(config: dict, length: int) -> np.ndarray:
    """QWenAttention.logn_tensor: log of the 1-based position to the base seq_length, beyond seq_length."""
    trained = config["seq_length"]
    return np.array([math.log(i, trained) if i > trained else 1.0 for i in range(1, length + 1)])


def attention(x: np.ndarray, w: dict, config: dict) -> np.ndarray:
    """QWenAttention.forward."""
    length, heads = len(x), config["num_attention_heads"]
    mixed = x @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
    q, k, v = (part.reshape(length, heads, -1) for part in np.split(mixed, 3, axis=-1))
    angles = rotary_angles(config, length)
    q, k = rotate(q, angles), rotate(k, angles)
    if length > config["seq_length"] and config["use_logn_attn"]:
        q = q * logn(config, length)[:, None, None]
    scores = np.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khc->qhc", weights, v).reshape(length, -1) @ w["attn.c_proj.weight"].T


def mlp(x: np.ndarray, w: dict) -> np.ndarray:
    """QWenMLP.forward: w1 is multiplied with the silu of w2."""
    a2 = x @ w["mlp.w2.weight"].T
    return (x @ w["mlp.w1.weight"].T * (a2 / (1 + np.exp(-a2)))) @ w["mlp.c_proj.weight"].T


def logprobs(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """QWenLMHeadModel.forward, then log softmax: [tokens, vocab]."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    eps, x = config["layer_norm_epsilon"], tensors["transformer.wte.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{i}."
        w = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        x = x + attention(rms_norm(x, w["ln_1.weight"], eps), w, config)
        x = x + mlp(rms_norm(x, w["ln_2.weight"], eps), w)
    logits = rms_norm(x, tensors["transformer.ln_f.weight"], eps) @ tensors["lm_head.weight"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
