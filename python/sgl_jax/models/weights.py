"""Declares the decoder's weights, each once: shape, logical axes and dtype. Loading and random weights are maps over
them.

Matrices are [out, in], as checkpoints have them: nothing is transposed at load, a tied head is the embedding itself,
and XLA CPU multiplies fastest with the weight on the left (docs/decisions/0006-weights-out-in.md). Layers are a list of
trees; `runtime` stacks like ones where the platform scans over layers.

One tree serves for specs, arrays, abstract arrays and axes: `Weights[WeightSpec]`, `Weights[jax.Array]`. A quantised
matrix is a small tree of leaves in the place of one leaf.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig, MlaConfig, MoeConfig
from sgl_jax.models.quantised import Matrix
from sgl_jax.models.spec import SITES, ExpertSite, Site, WeightSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts[Leaf]:
    """Matrices and biases of E experts. Grouped matmul takes those of all layers and a layer's index."""

    gate_up: Matrix[Leaf]  # [E, 2F, D], gate then up
    gate_up_bias: Leaf | None  # [E, 2F]
    down: Matrix[Leaf]  # [E, D, F]
    down_bias: Leaf | None  # [E, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeWeights[Leaf]:
    """Weights of a router, of the routed experts and of the expert that every token takes."""

    router: Matrix[Leaf]  # [E, D]
    router_bias: Leaf | None  # [E]
    score_bias: Leaf | None  # [E], the correction bias
    experts: Experts[Leaf] | None  # None inside a layer's body, which gets them apart (decoder.run_layers)
    shared_gate_up: Matrix[Leaf] | None  # [2F, D]
    shared_down: Matrix[Leaf] | None  # [D, F]
    shared_gate: Matrix[Leaf] | None  # [1, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MlaWeights[Leaf]:
    """Weights of latent attention (models/mla.py). Queries are made from the token by q, or through a vector of Cq by
    q_down, q_norm and q_up; the weights of the other way are None."""

    q: Matrix[Leaf] | None  # [N * H, D]; in each head the part without rope comes first
    q_down: Matrix[Leaf] | None  # [Cq, D]
    q_norm: Leaf | None  # [Cq]
    q_up: Matrix[Leaf] | None  # [N * H, Cq]
    kv_down: Matrix[Leaf]  # [C + rope, D], compressed keys and values, then the rotated key
    kv_norm: Leaf  # [C]
    k_up: Leaf  # [N * nope, C]
    v_up: Leaf  # [N * V, C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights[Leaf]:
    """Weights of one decoder layer. A weight that the family or the layer lacks is None."""

    attn_norm: Leaf | None  # [D]; None in the first layer of an EAGLE head
    qkv: Matrix[Leaf] | None  # [(N + 2K) * H, D], q then k then v
    qkv_bias: Leaf | None  # [(N + 2K) * H]
    q_norm: Leaf | None  # [H]
    k_norm: Leaf | None  # [H]
    sinks: Leaf | None  # [N]
    kv_scales: Leaf | None  # f32[2]: the pool holds K / [0] and V / [1]
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


# L layers, or a stack [n, …] for each group of like layers.
type Layers[Leaf] = list[LayerWeights[Leaf]] | tuple[LayerWeights[Leaf], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftWeights[Leaf]:
    """Weights of a draft model (DraftConfig). D is its own width, Dt the target's; F features are joined. A weight
    that its kind lacks is None; for embed and lm_head the target's are taken then."""

    embed: Leaf | None  # [V, D]
    fc: Matrix[Leaf] | None  # [D, 2D], or [D, F * Dt] of EAGLE-3, which has none where the feature is the final output
    fc_bias: Leaf | None  # [D]
    fc_norm: Leaf | None  # [F * Dt], of the joined features together
    fc_norms: list[Leaf]  # [Dt] each, of the joined features one by one
    embed_norm: Leaf | None  # [D]
    feature_norm: Leaf | None  # [D]
    layers: list[LayerWeights[Leaf]]
    final_norm: Leaf | None  # [D]
    lm_head: Matrix[Leaf] | None  # [V', D]
    d2t: Leaf | None  # i32[V'], id of the target less id of the draft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights[Leaf]:
    """Weights of the whole model."""

    embed: Leaf  # [V, D]
    layers: Layers[Leaf]
    final_norm: Leaf  # [D]
    lm_head: Matrix[Leaf] | None  # [V, D]; None: tied to embed
    draft: DraftWeights[Leaf] | None = None

    @property
    def stacked(self) -> bool:
        return isinstance(self.layers, tuple)


def declare(c: DecoderConfig, dtype: DTypeLike, *, stacked: bool = False) -> Weights[WeightSpec]:
    """Return the specs of a model's weights as they are held: in `dtype`, or as the model's weight format says."""
    specs, scheme = declare_plain(c, dtype), c.weight_scheme
    if scheme is not None:
        specs = jax.tree_util.tree_map_with_path(
            lambda path, spec: scheme.declare(site, spec) if (site := site_of(path, c.wide)) else spec, specs
        )
    if not stacked:
        return specs
    return dataclasses.replace(specs, layers=stack([*specs.layers], c.layer_groups()))


def declare_plain(c: DecoderConfig, dtype: DTypeLike) -> Weights[WeightSpec]:
    """Return the specs of a model's weights before any weight format: one for each matrix, layers in a list."""
    d, v, name = c.hidden_size, c.vocab_size, np.dtype(dtype).name

    def spec(*dims: tuple[int, str | None], parts: tuple[int, ...] = (), unit: int = 1) -> WeightSpec:
        shape, axes = zip(*dims, strict=True)
        return WeightSpec(shape, axes, name, parts, unit)

    return Weights(
        embed=spec((v, "vocab"), (d, "model")),
        layers=[_layer(c, spec, c.has_experts(i), c.has_mlp(i)) for i in range(c.num_layers)],
        final_norm=_norm(spec, d),
        lm_head=None if c.pooling or (c.tie_embeddings and not c.copies_head) else spec((v, "vocab"), (d, "model")),
        draft=_draft(c, c.draft, spec) if c.draft else None,
    )


def site_of(path: tuple[Any, ...], wide: Collection[str] = ()) -> Site | ExpertSite | None:
    """Return the product that the weight at a path of the tree takes part in; None if it takes part in none, or is wide."""
    name = jax.tree_util.keystr(path)
    return None if name in wide else SITES.get(re.sub(r"^\.(layers\[\d+\]\.)?", "", name))


def stack[Layer](layers: list[Layer], sizes: tuple[int, ...]) -> tuple[Layer, ...]:
    """Return the specs of a stack for each run of like layers, whose sizes are given."""
    firsts = (layers[sum(sizes[:i])] for i in range(len(sizes)))
    return tuple(jax.tree.map(lambda s, n=n: s.stacked(n), layer) for layer, n in zip(firsts, sizes, strict=True))


type Spec = Callable[..., WeightSpec]  # see declare_plain


def _norm(spec: Spec, size: int, axis: str | None = "model") -> WeightSpec:
    """Return the spec of a norm's factors: float32, as the norm uses them. On TPU a cast in the step is an operation of its own,
    twice a layer. Heads of q and k are normed by the attention kernels, which cast their factors themselves."""
    return dataclasses.replace(spec((size, axis)), dtype="float32")


def _draft(c: DecoderConfig, draft: DraftConfig, spec: Spec) -> DraftWeights[WeightSpec]:
    own = draft.decoder
    d, joined = (own.hidden_size, "model"), (draft.num_features * c.hidden_size, None)
    is_eagle3, both = draft.kind == "eagle3", (2 * own.hidden_size, None)
    has_fc = bool(draft.target_layers) if is_eagle3 else draft.kind != "standalone"
    layers = [_layer(own, spec, own.has_experts(i), own.has_mlp(i)) for i in range(own.num_layers)]
    if is_eagle3:
        qkv = layers[0].qkv
        assert isinstance(qkv, WeightSpec)
        layers[0] = dataclasses.replace(layers[0], qkv=dataclasses.replace(qkv, shape=(qkv.shape[0], both[0])))
    if draft.kind == "eagle":
        layers[0] = dataclasses.replace(layers[0], attn_norm=None)
    offsets = dataclasses.replace(spec((own.vocab_size, "vocab")), dtype="int32")
    return DraftWeights(
        embed=spec((c.vocab_size, "vocab"), d) if draft.own_embed else None,
        fc=spec(d, joined if is_eagle3 else both) if has_fc else None,
        fc_bias=spec(d) if draft.fc_bias else None,
        fc_norm=_norm(spec, *joined) if draft.norm_before_fc else None,
        fc_norms=[_norm(spec, c.hidden_size) for _ in range(draft.num_features if draft.fc_norms else 0)],
        embed_norm=_norm(spec, own.hidden_size) if draft.kind == "mtp" else None,
        feature_norm=_norm(spec, own.hidden_size) if draft.kind in ("mtp", "eagle3") else None,
        layers=layers,
        final_norm=_norm(spec, own.hidden_size) if draft.kind != "eagle" else None,
        lm_head=spec((own.vocab_size, "vocab"), d) if draft.own_head else None,
        d2t=offsets if draft.is_reduced else None,
    )


def _layer(c: DecoderConfig, spec: Spec, has_experts: bool, dense: bool) -> LayerWeights[WeightSpec]:
    d, f = c.hidden_size, c.intermediate_size
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    fused = (q_size, kv_size, kv_size)
    qkv_spec = functools.partial(spec, (sum(fused), "heads"), parts=fused, unit=c.head_dim)
    return LayerWeights(
        attn_norm=_norm(spec, d),
        qkv=None if c.mla else qkv_spec((d, "model")),
        qkv_bias=qkv_spec() if c.qkv_bias else None,
        q_norm=spec((c.head_dim, None)) if c.qk_norm else None,
        k_norm=spec((c.head_dim, None)) if c.qk_norm else None,
        sinks=spec((c.num_heads, "heads")) if c.attn_sinks else None,
        kv_scales=dataclasses.replace(spec((2, None)), dtype="float32") if c.scales_kv else None,
        mla=_mla(c.mla, spec, d, c.num_heads) if c.mla else None,
        o=spec((d, "model"), (c.num_heads * c.output_dim // c.head_replicas, "heads")),
        o_bias=spec((d, "model")) if c.o_bias else None,
        post_attn_norm=_norm(spec, d) if c.sandwich_norms else None,
        mlp_norm=_norm(spec, d),
        gate_up=spec((2 * f, "ffn"), (d, "model"), parts=(f, f)) if dense else None,
        gate_up_bias=spec((2 * f, "ffn"), parts=(f, f)) if dense and c.mlp_bias else None,
        down=spec((d, "model"), (f, "ffn")) if dense else None,
        down_bias=spec((d, "model")) if dense and c.mlp_bias else None,
        moe=_moe(c.moe, spec, d) if c.moe and has_experts else None,
        post_mlp_norm=_norm(spec, d) if c.sandwich_norms else None,
    )


def _mla(m: MlaConfig, spec: Spec, d: int, heads: int) -> MlaWeights[WeightSpec]:
    q_size, q_rank = heads * m.head_dim, m.q_lora_rank or 0
    return MlaWeights(
        q=None if q_rank else spec((q_size, "heads"), (d, "model"), unit=m.head_dim),
        q_down=spec((q_rank, None), (d, "model")) if q_rank else None,
        q_norm=_norm(spec, q_rank, None) if q_rank else None,
        q_up=spec((q_size, "heads"), (q_rank, None), unit=m.head_dim) if q_rank else None,
        kv_down=spec((m.latent_dim, None), (d, "model")),
        kv_norm=_norm(spec, m.kv_lora_rank, None),
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


def parameters(config: DecoderConfig) -> int:
    """Count the parameters of a model, or of one device's shard of it, whatever format they are held in."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(declare_plain(config, "float32")))


def parameters_per_token(config: DecoderConfig) -> int:
    """Count the parameters that each token is multiplied with: every matrix of the layers, of experts only the chosen
    ones, and the head, tied or not, where there is one."""
    declared = declare_plain(config, "float32")
    return _multiplied((declared.layers, None if config.pooling else head(declared)), config)


def draft_parameters(config: DecoderConfig) -> int:
    """Count likewise the parameters of the draft model; 0 without one."""
    declared = declare_plain(config, "float32")
    draft = declared.draft
    if draft is None or config.draft is None:
        return 0
    own_head = draft.embed if config.draft.kind == "standalone" else head(declared)
    return _multiplied((draft.layers, draft.lm_head or own_head), config.draft.decoder)


def _multiplied(specs: Any, config: DecoderConfig) -> int:
    """Count the parameters that a token is multiplied with, of a tree of specs."""
    chosen = config.moe.experts_per_token if config.moe else 0
    matrices = [spec for spec in jax.tree.leaves(specs) if spec.is_matrix]
    return sum(math.prod(s.shape) // (s.num_experts or 1) * (chosen if s.num_experts else 1) for s in matrices)


def head[Leaf](weights: Weights[Leaf]) -> Matrix[Leaf]:
    """Return the output head, [V, D], which is the embedding where it is tied."""
    return weights.embed if weights.lm_head is None else weights.lm_head
