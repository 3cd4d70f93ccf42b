"""The decoder's weights: each one declared once (shape, logical axes, dtype); loading and random init are maps over it.

Matrices are [out, in], as checkpoints have them: nothing is transposed at load, a tied head is the embedding itself, and
XLA CPU multiplies fastest with the weight on the left (docs/decisions/0006-weights-out-in.md). Layers are a list of
identical trees; `runtime` stacks them where the platform scans over layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from sgl_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight: what it is before there is data for it. A leaf of the declared tree."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, which parallel/ maps to the mesh
    parts: tuple[int, ...] = ()  # rows of the tensors that lie one below the other in it; empty: it is one tensor
    unit: int = 1  # rows that stay together when a part is divided over devices: a head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. A weight the family lacks is None."""

    attn_norm: Any  # [D]
    qkv: Any  # [(N + 2K) * H, D], q then k then v
    qkv_bias: Any  # [(N + 2K) * H]
    q_norm: Any  # [H]
    k_norm: Any  # [H]
    o: Any  # [D, N * H]
    o_bias: Any  # [D]
    mlp_norm: Any  # [D]
    gate_up: Any  # [2F, D], gate then up
    gate_up_bias: Any  # [2F]
    down: Any  # [D, F]
    down_bias: Any  # [D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    embed: Any  # [V, D]
    layers: list[LayerWeights] | LayerWeights  # L of them, or one with every leaf stacked [L, …]
    final_norm: Any  # [D]
    lm_head: Any  # [V, D]; None: tied to embed


def declare(c: DecoderConfig) -> Weights:
    """The tree of WeightSpec that a model of this config has."""
    d, f, v = c.hidden_size, c.intermediate_size, c.vocab_size
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qkv_parts: dict[str, Any] = {"parts": (q_size, kv_size, kv_size), "unit": c.head_dim}

    def spec(*shape_and_axes: tuple[int, str | None], when: bool = True, **parts: Any) -> WeightSpec | None:
        return WeightSpec(*(tuple(x) for x in zip(*shape_and_axes, strict=True)), **parts) if when else None

    layer = LayerWeights(
        attn_norm=spec((d, "model")),
        qkv=spec((q_size + 2 * kv_size, "heads"), (d, "model"), **qkv_parts),
        qkv_bias=spec((q_size + 2 * kv_size, "heads"), when=c.qkv_bias, **qkv_parts),
        q_norm=spec((c.head_dim, None), when=c.qk_norm),
        k_norm=spec((c.head_dim, None), when=c.qk_norm),
        o=spec((d, "model"), (q_size, "heads")),
        o_bias=spec((d, "model"), when=c.o_bias),
        mlp_norm=spec((d, "model")),
        gate_up=spec((2 * f, "ffn"), (d, "model"), parts=(f, f)),
        gate_up_bias=spec((2 * f, "ffn"), when=c.mlp_bias, parts=(f, f)),
        down=spec((d, "model"), (f, "ffn")),
        down_bias=spec((d, "model"), when=c.mlp_bias),
    )
    return Weights(
        embed=spec((v, "vocab"), (d, "model")),
        layers=[layer] * c.num_layers,
        final_norm=spec((d, "model")),
        lm_head=spec((v, "vocab"), (d, "model"), when=not c.tie_embeddings),
    )


def parameters_per_token(config: DecoderConfig) -> int:
    """Parameters each token is multiplied with: every matrix of the layers, and the head, tied or not; no lookup."""
    declared = declare(config)
    matrices = [spec for spec in jax.tree.leaves(declared.layers) if len(spec.shape) == 2]
    return sum(math.prod(spec.shape) for spec in [*matrices, head(declared)])


def head(weights: Weights) -> Any:
    """The output head, [V, D]."""
    return weights.embed if weights.lm_head is None else weights.lm_head
