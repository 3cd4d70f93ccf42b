"""The decoder's weights: each one declared once (shape, logical axes, dtype); loading and random init are maps over it.

Matrices are stored input-major, [in, out], so that every projection is `x @ w`. Layers are a list of identical trees;
`runtime` stacks them where the platform scans over layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from sgl_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight: what it is before there is data for it. A leaf of the declared tree."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, which parallel/ maps to the mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. A weight the family lacks is None."""

    attn_norm: Any  # [D]
    qkv: Any  # [D, (N + 2K) * H], q then k then v
    qkv_bias: Any  # [(N + 2K) * H]
    q_norm: Any  # [H]
    k_norm: Any  # [H]
    o: Any  # [N * H, D]
    o_bias: Any  # [D]
    mlp_norm: Any  # [D]
    gate_up: Any  # [D, 2F], gate then up
    gate_up_bias: Any  # [2F]
    down: Any  # [F, D]
    down_bias: Any  # [D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    embed: Any  # [V, D]
    layers: list[LayerWeights]  # L of them
    final_norm: Any  # [D]
    lm_head: Any  # [D, V]; a tied head is its own transposed copy (docs/decisions/)


def declare(c: DecoderConfig) -> Weights:
    """The tree of WeightSpec that a model of this config has."""
    d, f, v = c.hidden_size, c.intermediate_size, c.vocab_size
    q_size, qkv_size = c.num_heads * c.head_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim

    def spec(*shape_and_axes: tuple[int, str | None], when: bool = True) -> WeightSpec | None:
        return WeightSpec(*(tuple(x) for x in zip(*shape_and_axes, strict=True))) if when else None

    layer = LayerWeights(
        attn_norm=spec((d, "model")),
        qkv=spec((d, "model"), (qkv_size, "heads")),
        qkv_bias=spec((qkv_size, "heads"), when=c.qkv_bias),
        q_norm=spec((c.head_dim, None), when=c.qk_norm),
        k_norm=spec((c.head_dim, None), when=c.qk_norm),
        o=spec((q_size, "heads"), (d, "model")),
        o_bias=spec((d, "model"), when=c.o_bias),
        mlp_norm=spec((d, "model")),
        gate_up=spec((d, "model"), (2 * f, "ffn")),
        gate_up_bias=spec((2 * f, "ffn"), when=c.mlp_bias),
        down=spec((f, "ffn"), (d, "model")),
        down_bias=spec((d, "model"), when=c.mlp_bias),
    )
    return Weights(
        embed=spec((v, "vocab"), (d, "model")),
        layers=[layer] * c.num_layers,
        final_norm=spec((d, "model")),
        lm_head=spec((d, "model"), (v, "vocab")),
    )
