"""The decoder's weights: each one declared once (shape, logical axes, dtype); loading and random init are maps over it.

Matrices are [out, in], as checkpoints have them: nothing is transposed at load, a tied head is the embedding itself, and
XLA CPU multiplies fastest with the weight on the left (docs/decisions/0006-weights-out-in.md). Layers are a list of
identical trees; `runtime` stacks them where the platform scans over layers.

One tree serves for specs, arrays, abstract arrays and axes: `Weights[WeightSpec]`, `Weights[jax.Array]`. A matrix may be
quantised, which is a small tree of leaves in the place of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.decoder_config import DecoderConfig, MlaConfig, MoeConfig
from sgl_jax.models.quantised import Matrix
from sgl_jax.models.spec import SITES, ExpertSite, Site, WeightSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts[Leaf]:
    """The matrices of E experts. Grouped matmul takes those of all layers, and reads the layer's own by its index; the
    biases go with them."""

    gate_up: Matrix[Leaf]  # [E, 2F, D], gate then up
    gate_up_bias: Leaf | None  # [E, 2F]
    down: Matrix[Leaf]  # [E, D, F]
    down_bias: Leaf | None  # [E, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeWeights[Leaf]:
    """The router, the routed experts and the expert that every token takes."""

    router: Matrix[Leaf]  # [E, D]
    router_bias: Leaf | None  # [E]
    score_bias: Leaf | None  # [E], the correction bias
    experts: Experts[Leaf] | None  # None: they go another way than the rest of their layer (decoder.run_layers)
    shared_gate_up: Matrix[Leaf] | None  # [2F, D]
    shared_down: Matrix[Leaf] | None  # [D, F]
    shared_gate: Matrix[Leaf] | None  # [1, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlaWeights[Leaf]:
    """Latent attention. Queries are made from the token by q, or through a vector of Cq by q_down, q_norm and q_up; the
    weights of the other way are None. k_up and v_up are no linear maps of a token (models/mla.py)."""

    q: Matrix[Leaf] | None  # [N * H, D], of each head the part without rope, then the part with it
    q_down: Matrix[Leaf] | None  # [Cq, D]
    q_norm: Leaf | None  # [Cq]
    q_up: Matrix[Leaf] | None  # [N * H, Cq]
    kv_down: Matrix[Leaf]  # [C + rope, D], the compressed, then the rotated key
    kv_norm: Leaf  # [C]
    k_up: Leaf  # [N * nope, C]
    v_up: Leaf  # [N * V, C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights[Leaf]:
    """One decoder layer. A weight the family, or the layer, lacks is None."""

    attn_norm: Leaf  # [D]
    qkv: Matrix[Leaf] | None  # [(N + 2K) * H, D], q then k then v
    qkv_bias: Leaf | None  # [(N + 2K) * H]
    q_norm: Leaf | None  # [H]
    k_norm: Leaf | None  # [H]
    sinks: Leaf | None  # [N]
    mla: MlaWeights[Leaf] | None
    o: Matrix[Leaf]  # [D, N * H]
    o_bias: Leaf | None  # [D]
    post_attn_norm: Leaf | None  # [D]
    mlp_norm: Leaf  # [D]
    gate_up: Matrix[Leaf] | None  # [2F, D], gate then up
    gate_up_bias: Leaf | None  # [2F]
    down: Matrix[Leaf] | None  # [D, F]
    down_bias: Leaf | None  # [D]
    moe: MoeWeights[Leaf] | None
    post_mlp_norm: Leaf | None  # [D]


# L of them, or a stack [n, …] for each group of like layers.
type Layers[Leaf] = list[LayerWeights[Leaf]] | tuple[LayerWeights[Leaf], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights[Leaf]:
    """The whole model."""

    embed: Leaf  # [V, D]
    layers: Layers[Leaf]
    final_norm: Leaf  # [D]
    lm_head: Matrix[Leaf] | None  # [V, D]; None: tied to embed

    @property
    def stacked(self) -> bool:
        return isinstance(self.layers, tuple)


def declare(c: DecoderConfig, dtype: DTypeLike, *, stacked: bool = False) -> Weights[WeightSpec]:
    """The specs of a model's weights, each as it is held: in `dtype`, or as the model's weight format says."""
    specs, scheme = declare_plain(c, dtype), c.weight_scheme
    if scheme is not None:
        specs = jax.tree_util.tree_map_with_path(
            lambda path, spec: scheme.declare(site, spec) if (site := site_of(path)) else spec, specs
        )
    if not stacked:
        return specs
    sizes = c.layer_groups()
    firsts = [specs.layers[sum(sizes[:i])] for i in range(len(sizes))]
    return dataclasses.replace(specs, layers=tuple(map(_stack, firsts, sizes)))


def declare_plain(c: DecoderConfig, dtype: DTypeLike) -> Weights[WeightSpec]:
    """The specs of a model's weights before any weight format: one for each matrix, layers in a list."""
    d, v = c.hidden_size, c.vocab_size
    spec = functools.partial(_spec, dtype=np.dtype(dtype).name)
    return Weights(
        embed=spec((v, "vocab"), (d, "model")),
        layers=[_layer(c, spec, c.has_experts(i), c.has_mlp(i)) for i in range(c.num_layers)],
        final_norm=spec((d, "model")),
        lm_head=None if c.tie_embeddings else spec((v, "vocab"), (d, "model")),
    )


def site_of(path: tuple[Any, ...]) -> Site | ExpertSite | None:
    """The product that the weight at a path of the tree takes part in; None if it takes part in none."""
    return SITES.get(re.sub(r"^\.(layers\[\d+\]\.)?", "", jax.tree_util.keystr(path)))


def _stack(layer: LayerWeights[WeightSpec], n: int) -> LayerWeights[WeightSpec]:
    return jax.tree.map(lambda s: dataclasses.replace(s, shape=(n, *s.shape), axes=(None, *s.axes)), layer)


def _layer(c: DecoderConfig, spec: Spec, has_experts: bool, dense: bool) -> LayerWeights[WeightSpec]:
    d, f = c.hidden_size, c.intermediate_size
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qkv_spec = functools.partial(
        spec, (q_size + 2 * kv_size, "heads"), parts=(q_size, kv_size, kv_size), unit=c.head_dim
    )
    return LayerWeights(
        attn_norm=spec((d, "model")),
        qkv=None if c.mla else qkv_spec((d, "model")),
        qkv_bias=qkv_spec() if c.qkv_bias else None,
        q_norm=spec((c.head_dim, None)) if c.qk_norm else None,
        k_norm=spec((c.head_dim, None)) if c.qk_norm else None,
        sinks=spec((c.num_heads, "heads")) if c.attn_sinks else None,
        mla=_mla(c.mla, spec, d, c.num_heads) if c.mla else None,
        o=spec((d, "model"), (c.num_heads * c.output_dim // c.head_replicas, "heads")),
        o_bias=spec((d, "model")) if c.o_bias else None,
        post_attn_norm=spec((d, "model")) if c.sandwich_norms else None,
        mlp_norm=spec((d, "model")),
        gate_up=spec((2 * f, "ffn"), (d, "model"), parts=(f, f)) if dense else None,
        gate_up_bias=spec((2 * f, "ffn"), parts=(f, f)) if dense and c.mlp_bias else None,
        down=spec((d, "model"), (f, "ffn")) if dense else None,
        down_bias=spec((d, "model")) if dense and c.mlp_bias else None,
        moe=_moe(c.moe, spec, d) if c.moe and has_experts else None,
        post_mlp_norm=spec((d, "model")) if c.sandwich_norms else None,
    )


def _mla(m: MlaConfig, spec: Spec, d: int, heads: int) -> MlaWeights[WeightSpec]:
    q_size, q_rank = heads * m.head_dim, m.q_lora_rank or 0
    return MlaWeights(
        q=None if q_rank else spec((q_size, "heads"), (d, "model"), unit=m.head_dim),
        q_down=spec((q_rank, None), (d, "model")) if q_rank else None,
        q_norm=spec((q_rank, None)) if q_rank else None,
        q_up=spec((q_size, "heads"), (q_rank, None), unit=m.head_dim) if q_rank else None,
        kv_down=spec((m.latent_dim, None), (d, "model")),
        kv_norm=spec((m.kv_lora_rank, None)),
        k_up=spec((heads * m.qk_nope_head_dim, "heads"), (m.kv_lora_rank, None), unit=m.qk_nope_head_dim),
        v_up=spec((heads * m.v_head_dim, "heads"), (m.kv_lora_rank, None), unit=m.v_head_dim),
    )


def _moe(m: MoeConfig, spec: Spec, d: int) -> MoeWeights[WeightSpec]:
    e, f, shared = m.num_experts, m.intermediate_size, m.shared_intermediate_size
    held = e // m.expert_groups
    return MoeWeights(
        router=spec((e, None), (d, "model")),
        router_bias=spec((e, None)) if m.router_bias else None,
        score_bias=spec((e, None)) if m.correction_bias else None,
        experts=Experts(
            gate_up=spec((held, "experts"), (2 * f, "expert_ffn"), (d, "model"), parts=(f, f)),
            gate_up_bias=spec((held, "experts"), (2 * f, "expert_ffn"), parts=(f, f)) if m.bias else None,
            down=spec((held, "experts"), (d, "model"), (f, "expert_ffn")),
            down_bias=spec((held, "experts"), (d, "model")) if m.bias else None,
        ),
        shared_gate_up=spec((2 * shared, "ffn"), (d, "model"), parts=(shared, shared)) if shared else None,
        shared_down=spec((d, "model"), (shared, "ffn")) if shared else None,
        shared_gate=spec((1, None), (d, "model")) if m.shared_gate else None,
    )


Spec = Callable[..., WeightSpec]  # _spec with the dtype filled in


def _spec(
    *shape_and_axes: tuple[int, str | None], dtype: str, parts: tuple[int, ...] = (), unit: int = 1
) -> WeightSpec:
    shape, axes = zip(*shape_and_axes, strict=True)
    return WeightSpec(shape, axes, dtype, parts, unit)


def parameters(config: DecoderConfig) -> int:
    """Parameters of a model, or of one device's shard of it, whatever format they are held in."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare_plain(config, "float32")))


def parameters_per_token(config: DecoderConfig) -> int:
    """Parameters each token is multiplied with: every matrix of the layers, only the chosen experts', and the head,
    tied or not; no lookup."""
    declared = declare_plain(config, "float32")
    chosen = config.moe.experts_per_token if config.moe else 0

    def used(spec: WeightSpec) -> int:
        if not spec.is_matrix:
            return 0
        size = math.prod(spec.shape)
        return size if spec.num_experts is None else size // spec.num_experts * chosen

    return sum(map(used, [*jax.tree.leaves(declared.layers), *jax.tree.leaves(head(declared))]))


def head[Leaf](weights: Weights[Leaf]) -> Matrix[Leaf]:
    """The output head, [V, D]."""
    return weights.embed if weights.lm_head is None else weights.lm_head
