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

from sgl_jax.models.config import DecoderConfig, MlaConfig, MoeConfig


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One weight: what it is before there is data for it. A leaf of the declared tree."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, which parallel/ maps to the mesh
    parts: tuple[int, ...] = ()  # output rows of the tensors that lie one below the other in it; empty: it is one
    unit: int = 1  # rows that stay together when a part is divided over devices: a head

    @property
    def rows_axis(self) -> int:
        """The axis of the output rows, which `parts` divides: the experts' comes before it."""
        return 1 if self.axes[0] == "experts" else 0

    @property
    def num_experts(self) -> int | None:
        return self.shape[0] if self.rows_axis else None

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) - self.rows_axis == 2

    @property
    def piece_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored tensors it is put together from: its parts, of each expert in turn."""
        rows, *columns = self.shape[self.rows_axis :]
        return tuple((part, *columns) for part in self.parts or (rows,)) * (self.num_experts or 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """E matrices each. Grouped matmul takes them with the layers' axis whole, and reads the layer's own by its index;
    the biases go with them."""

    gate_up: Any  # [E, 2F, D], gate then up
    gate_up_bias: Any  # [E, 2F]
    down: Any  # [E, D, F]
    down_bias: Any  # [E, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeWeights:
    router: Any  # [E, D]
    router_bias: Any  # [E]
    score_bias: Any  # [E]
    experts: Experts
    shared_gate_up: Any  # [2F, D]
    shared_down: Any  # [D, F]
    shared_gate: Any  # [1, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlaWeights:
    """Queries come from the token, or from it compressed to Cq: then q is None, else q_down, q_norm and q_up are."""

    q: Any  # [N * H, D], of each head the part without rope, then the part with it
    q_down: Any  # [Cq, D]
    q_norm: Any  # [Cq]
    q_up: Any  # [N * H, Cq]
    kv_down: Any  # [C + rope, D], the compressed, then the rotated key
    kv_norm: Any  # [C]
    k_up: Any  # [N * nope, C]
    v_up: Any  # [N * V, C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. A weight the family, or the layer, lacks is None."""

    attn_norm: Any  # [D]
    qkv: Any  # [(N + 2K) * H, D], q then k then v
    qkv_bias: Any  # [(N + 2K) * H]
    q_norm: Any  # [H]
    k_norm: Any  # [H]
    sinks: Any  # [N]
    mla: MlaWeights | None
    o: Any  # [D, N * H]
    o_bias: Any  # [D]
    post_attn_norm: Any  # [D]
    mlp_norm: Any  # [D]
    gate_up: Any  # [2F, D], gate then up
    gate_up_bias: Any  # [2F]
    down: Any  # [D, F]
    down_bias: Any  # [D]
    moe: MoeWeights | None
    post_mlp_norm: Any  # [D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    embed: Any  # [V, D]
    layers: list[LayerWeights] | tuple[LayerWeights, ...]  # L of them; or a stack [n, …] for each group of like layers
    final_norm: Any  # [D]
    lm_head: Any  # [V, D]; None: tied to embed

    @property
    def stacked(self) -> bool:
        return isinstance(self.layers, tuple)


def declare(c: DecoderConfig, *, stacked: bool = False) -> Weights:
    """The tree of WeightSpec that a model of this config has, its layers in a list or stacked by groups."""
    d, v = c.hidden_size, c.vocab_size
    layers: Any = [_layer(c, c.has_experts(i), c.has_mlp(i)) for i in range(c.num_layers)]
    if stacked:
        sizes = c.layer_groups()
        firsts = [layers[sum(sizes[:i])] for i in range(len(sizes))]
        layers = tuple(_stack(first, n) for first, n in zip(firsts, sizes, strict=True))
    return Weights(
        embed=_spec((v, "vocab"), (d, "model")),
        layers=layers,
        final_norm=_spec((d, "model")),
        lm_head=_spec((v, "vocab"), (d, "model"), when=not c.tie_embeddings),
    )


def _stack(layer: LayerWeights, n: int) -> LayerWeights:
    return jax.tree.map(lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(None, *s.axes)), layer)


def _layer(c: DecoderConfig, has_experts: bool, dense: bool) -> LayerWeights:
    d, f = c.hidden_size, c.intermediate_size
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qkv_parts: dict[str, Any] = {"parts": (q_size, kv_size, kv_size), "unit": c.head_dim}
    heads = c.mla is None
    return LayerWeights(
        attn_norm=_spec((d, "model")),
        qkv=_spec((q_size + 2 * kv_size, "heads"), (d, "model"), **qkv_parts, when=heads),
        qkv_bias=_spec((q_size + 2 * kv_size, "heads"), when=c.qkv_bias, **qkv_parts),
        q_norm=_spec((c.head_dim, None), when=c.qk_norm),
        k_norm=_spec((c.head_dim, None), when=c.qk_norm),
        sinks=_spec((c.num_heads, "heads"), when=c.attn_sinks),
        mla=_mla(c.mla, d, c.num_heads) if c.mla else None,
        o=_spec((d, "model"), (c.num_heads * c.output_dim // c.head_copies, "heads")),
        o_bias=_spec((d, "model"), when=c.o_bias),
        post_attn_norm=_spec((d, "model"), when=c.sandwich_norms),
        mlp_norm=_spec((d, "model")),
        gate_up=_spec((2 * f, "ffn"), (d, "model"), parts=(f, f), when=dense),
        gate_up_bias=_spec((2 * f, "ffn"), parts=(f, f), when=dense and c.mlp_bias),
        down=_spec((d, "model"), (f, "ffn"), when=dense),
        down_bias=_spec((d, "model"), when=dense and c.mlp_bias),
        moe=_moe(c.moe, d) if c.moe and has_experts else None,
        post_mlp_norm=_spec((d, "model"), when=c.sandwich_norms),
    )


def _mla(m: MlaConfig, d: int, heads: int) -> MlaWeights:
    q_size, q_rank = heads * m.head_dim, m.q_lora_rank or 0
    return MlaWeights(
        q=_spec((q_size, "heads"), (d, "model"), unit=m.head_dim, when=not q_rank),
        q_down=_spec((q_rank, None), (d, "model"), when=q_rank > 0),
        q_norm=_spec((q_rank, None), when=q_rank > 0),
        q_up=_spec((q_size, "heads"), (q_rank, None), unit=m.head_dim, when=q_rank > 0),
        kv_down=_spec((m.latent_dim, None), (d, "model")),
        kv_norm=_spec((m.kv_lora_rank, None)),
        k_up=_spec((heads * m.qk_nope_head_dim, "heads"), (m.kv_lora_rank, None), unit=m.qk_nope_head_dim),
        v_up=_spec((heads * m.v_head_dim, "heads"), (m.kv_lora_rank, None), unit=m.v_head_dim),
    )


def _moe(m: MoeConfig, d: int) -> MoeWeights:
    e, f, shared = m.num_experts, m.intermediate_size, m.shared_intermediate_size
    held = e // m.expert_groups
    return MoeWeights(
        router=_spec((e, None), (d, "model")),
        router_bias=_spec((e, None), when=m.router_bias),
        score_bias=_spec((e, None), when=m.score_bias),
        experts=Experts(
            gate_up=_spec((held, "experts"), (2 * f, "expert_ffn"), (d, "model"), parts=(f, f)),
            gate_up_bias=_spec((held, "experts"), (2 * f, "expert_ffn"), parts=(f, f), when=m.bias),
            down=_spec((held, "experts"), (d, "model"), (f, "expert_ffn")),
            down_bias=_spec((held, "experts"), (d, "model"), when=m.bias),
        ),
        shared_gate_up=_spec((2 * shared, "ffn"), (d, "model"), parts=(shared, shared), when=shared > 0),
        shared_down=_spec((d, "model"), (shared, "ffn"), when=shared > 0),
        shared_gate=_spec((1, None), (d, "model"), when=m.shared_gate),
    )


def _spec(*shape_and_axes: tuple[int, str | None], when: bool = True, **parts: Any) -> WeightSpec | None:
    shape, axes = zip(*shape_and_axes, strict=True)
    return WeightSpec(shape, axes, **parts) if when else None


def parameters_per_token(config: DecoderConfig) -> int:
    """Parameters each token is multiplied with: every matrix of the layers, only the chosen experts', and the head,
    tied or not; no lookup."""
    declared = declare(config)
    chosen = config.moe.experts_per_token if config.moe else 0

    def used(spec: WeightSpec) -> int:
        if not spec.is_matrix:
            return 0
        size = math.prod(spec.shape)
        return size if spec.num_experts is None else size // spec.num_experts * chosen

    return sum(map(used, [*jax.tree.leaves(declared.layers), head(declared)]))


def head(weights: Weights) -> Any:
    """The output head, [V, D]."""
    return weights.embed if weights.lm_head is None else weights.lm_head
