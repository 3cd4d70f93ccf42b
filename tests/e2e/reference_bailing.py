"""Bailing (Ling), both versions, in numpy, float64: a function for each formula of modeling_bailing_moe.py
(inclusionAI/Ling-lite) and modeling_bailing_moe_v2.py (inclusionAI/Ling-mini-2.0). Slow and plain: every token is computed
again for each new one, and every expert in a loop. Shares no code with the package."""

from __future__ import annotations

import math

import numpy as np

_BOTH = {
    "model_type": "bailing_moe",
    "vocab_size": 280,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

V1 = _BOTH | {
    "architectures": ["BailingMoeForCausalLM"],
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "first_k_dense_replace": 0,
    "norm_head": True,
    "norm_softmax": False,
    "multi_gate": False,
}

V2 = _BOTH | {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "head_dim": 24,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 12,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}


def is_v2(config: dict) -> bool:
    return config["architectures"] == ["BailingMoeV2ForCausalLM"]


def checkpoint(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Make random tensors, under the names of the family's own files."""
    rng = np.random.default_rng(seed)
    d, dim, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2 / math.sqrt(shape[-1])).astype(np.float32)

    def norm(size: int = d) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    def mlp_tensors(prefix: str, size: int) -> dict[str, np.ndarray]:
        return {
            f"{prefix}.gate_proj.weight": matrix(size, d),
            f"{prefix}.up_proj.weight": matrix(size, d),
            f"{prefix}.down_proj.weight": matrix(d, size),
        }

    tensors = {
        "model.word_embeddings.weight": matrix(vocab, d),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(vocab, d) * rng.uniform(0.5, 2, d).astype(np.float32),
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": norm(),
            "attention.query_key_value.weight": matrix((heads + 2 * kv_heads) * dim, d),
            "attention.dense.weight": matrix(d, heads * dim),
            "post_attention_layernorm.weight": norm(),
        }
        if is_v2(config):
            layer |= {"attention.query_layernorm.weight": norm(dim), "attention.key_layernorm.weight": norm(dim)}
        if i < config["first_k_dense_replace"]:
            layer |= mlp_tensors("mlp", config["intermediate_size"])
        else:
            layer["mlp.gate.weight"] = matrix(config["num_experts"], d)
            if is_v2(config):
                layer["mlp.gate.expert_bias"] = (0.1 * rng.standard_normal(config["num_experts"])).astype(np.float32)
            for e in range(config["num_experts"]):
                layer |= mlp_tensors(f"mlp.experts.{e}", config["moe_intermediate_size"])
            layer |= mlp_tensors("mlp.shared_experts", config["moe_intermediate_size"] * config["num_shared_experts"])
        tensors |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    return tensors


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """BailingMoeRMSNorm.forward."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, config: dict) -> np.ndarray:
    """apply_rotary_pos_emb; x [tokens, heads, channels]. The second version leaves the rear of each head as it is."""
    dim = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    angles = np.outer(np.arange(len(x)), 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim))
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    turned, rest = x[..., :dim], x[..., dim:]
    a, b = np.split(turned, 2, axis=-1)
    return np.concatenate([turned * cos + np.concatenate([-b, a], -1) * sin, rest], -1)


def attention(x: np.ndarray, w: dict, config: dict) -> np.ndarray:
    """BailingMoeAttention.forward, BailingMoeV2Attention.forward."""
    length, dim = len(x), config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv = (x @ w["attention.query_key_value.weight"].T).reshape(length, heads + 2 * kv_heads, dim)
    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
    if config.get("use_qk_norm"):
        q = rms_norm(q, w["attention.query_layernorm.weight"], config["rms_norm_eps"])
        k = rms_norm(k, w["attention.key_layernorm.weight"], config["rms_norm_eps"])
    q, k = rotate(q, config), rotate(k, config)
    k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
    scores = np.einsum("qhc,khc->hqk", q, k) / math.sqrt(dim)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khc->qhc", weights, v).reshape(length, -1) @ w["attention.dense.weight"].T


def mlp(x: np.ndarray, w: dict, prefix: str) -> np.ndarray:
    """BailingMoeMLP.forward."""
    gate = x @ w[f"{prefix}.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f"{prefix}.up_proj.weight"].T)) @ w[f"{prefix}.down_proj.weight"].T


def softmax_gate(x: np.ndarray, w: dict, config: dict) -> dict[int, float]:
    """BailingMoeGate.forward for one token: expert -> weight."""
    logits = w["mlp.gate.weight"] @ x
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    chosen = np.argsort(-scores)[: config["num_experts_per_tok"]]
    total = scores[chosen].sum() if config["norm_topk_prob"] else 1.0
    return {int(e): scores[e] / total for e in chosen}


def sigmoid_gate(x: np.ndarray, w: dict, config: dict) -> dict[int, float]:
    """BailingMoeV2Gate.forward with group_limited_topk for one token: expert -> weight."""
    scores = 1 / (1 + np.exp(-(w["mlp.gate.weight"] @ x)))
    routing = (scores + w["mlp.gate.expert_bias"]).reshape(config["n_group"], -1)
    best_two = np.sort(routing, axis=-1)[:, -2:].sum(-1)
    for group in np.argsort(-best_two)[config["topk_group"] :]:
        routing[group] = -np.inf
    chosen = np.argsort(-routing.reshape(-1))[: config["num_experts_per_tok"]]
    total = scores[chosen].sum() + 1e-20
    return {int(e): scores[e] / total * config["routed_scaling_factor"] for e in chosen}


def experts(x: np.ndarray, w: dict, config: dict) -> np.ndarray:
    """BailingMoeSparseMoeBlock.forward."""
    gate, out = sigmoid_gate if is_v2(config) else softmax_gate, np.zeros_like(x)
    for t, token in enumerate(x):
        for e, weight in gate(token, w, config).items():
            out[t] += weight * mlp(token, w, f"mlp.experts.{e}")
    return out + mlp(x, w, "mlp.shared_experts")


def head(weight: np.ndarray, config: dict) -> np.ndarray:
    """BailingMoeForCausalLM.compute_logit: with norm_head each column is divided by its length."""
    return weight / (np.linalg.norm(weight, axis=0, keepdims=True) + 1e-7) if config.get("norm_head") else weight


def layer_weights(tensors: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{i}."
    return {
        name.removeprefix(prefix): value.astype(np.float64)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def decoder_layer(x: np.ndarray, w: dict, config: dict) -> np.ndarray:
    """BailingMoeDecoderLayer.forward."""
    x = x + attention(rms_norm(x, w["input_layernorm.weight"], config["rms_norm_eps"]), w, config)
    h = rms_norm(x, w["post_attention_layernorm.weight"], config["rms_norm_eps"])
    return x + (experts(h, w, config) if "mlp.gate.weight" in w else mlp(h, w, "mlp"))


def hidden_states(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """BailingMoeModel.forward: the output after the final norm, [tokens, hidden]."""
    x = tensors["model.word_embeddings.weight"][ids].astype(np.float64)
    for i in range(config["num_hidden_layers"]):
        x = decoder_layer(x, layer_weights(tensors, i), config)
    return rms_norm(x, tensors["model.norm.weight"], config["rms_norm_eps"])


def logprobs(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """BailingMoeForCausalLM.forward, then log softmax: [tokens, vocab]."""
    logits = hidden_states(tensors, config, ids) @ head(tensors["lm_head.weight"].astype(np.float64), config).T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mtp_drafts(
    tensors: dict[str, np.ndarray], config: dict, ids: list[int], count: int
) -> tuple[list[int], list[float]]:
    """BailingMoeV2MTPLayer.forward and the head: the drafts after ids, and by how much the logit of each is the best.

    An entry is a token with the output, after its norm, of the position before it: the model's, then the MTP layer's own.
    """
    w, eps = layer_weights(tensors, config["num_hidden_layers"]), config["rms_norm_eps"]
    before = [*hidden_states(tensors, config, ids[:-1])]
    ids, gaps = list(ids), []
    for _ in range(count):
        e = rms_norm(tensors["model.word_embeddings.weight"][ids[1:]].astype(np.float64), w["enorm.weight"], eps)
        h = rms_norm(np.stack(before), w["hnorm.weight"], eps)
        out = decoder_layer(np.concatenate([e, h], -1) @ w["eh_proj.weight"].T, w, config)
        before.append(rms_norm(out, w["final_layernorm.weight"], eps)[-1])
        logits = head(tensors["lm_head.weight"].astype(np.float64), config) @ before[-1]
        ids.append(int(logits.argmax()))
        gaps.append(float(np.diff(np.sort(logits)[-2:])[0]))
    return ids[-count:], gaps
