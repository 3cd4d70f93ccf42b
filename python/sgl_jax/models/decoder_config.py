"""Switches in which decoder families differ. A family file fills them from config.json; the decoder reads them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from sgl_jax.models.quantised import Scheme, WeightFormat
from sgl_jax.parallel.grid import Grid

Activation = Literal["silu", "gelu", "gelu_tanh", "swiglu_oai"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Resolved rotary embedding: pair i is rotated by position * inv_freq[i] (half-split pairs)."""

    inv_freq: tuple[float, ...]  # [rotary_dim / 2]
    attention_factor: float = 1.0  # YaRN's scale on cos and sin


@dataclasses.dataclass(frozen=True)
class LongerContext:
    """Rope of contexts that are longer than usual. It is another one for all their positions."""

    length: int  # tokens at most
    rope: RopeConfig


@dataclasses.dataclass(frozen=True)
class LognScaling:
    """Logn scaling of queries: each is multiplied by max(1, log(position + offset) / log(length))."""

    length: int  # tokens of a context in training
    offset: int = 1  # 1: the query counts itself


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts: how tokens choose them, and what an expert is."""

    num_experts: int  # E
    experts_per_token: int  # X
    intermediate_size: int  # F of an expert
    shared_intermediate_size: int = 0  # F of the expert that every token takes; 0: there is none
    shared_gate: bool = False  # a sigmoid of the token scales the shared expert
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    router_softcap: float | None = None
    correction_bias: bool = False  # added to the scores when experts are chosen, not when their outputs are weighed
    num_groups: int = 1  # experts are chosen from the best groups only
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"  # a group's best expert, or the sum of its two best
    normalise: bool = True  # the weights of the chosen experts sum to 1
    scale: float = 1.0  # factor of the weights, after they are normalised
    bias: bool = False  # each expert has biases
    residual_scale: float | None = None  # scales the sum of MLP and experts; None: a layer with experts has no MLP
    expert_groups: int = 1  # in a device's shard: groups of devices over which the experts are spread

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"each token would take {self.experts_per_token} of {self.num_experts} experts")


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): all heads read one vector per token,
    which is its compressed keys and values and one rotated key."""

    kv_lora_rank: int  # C, width of the compressed keys and values
    q_lora_rank: int | None  # width of compressed queries; None: they are not compressed
    qk_nope_head_dim: int  # width of a head's part without rope
    qk_rope_head_dim: int  # width of its part with rope
    v_head_dim: int  # V
    interleaved: bool = True  # stored for rope that rotates neighbours; loading reorders rows to half-split pairs

    @property
    def head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token's vector in the pool."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Description of any decoder we serve. Letters are those of docs/architecture.md."""

    architecture: str  # the Hugging Face class name
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H; with MLA, the width of a head's query
    rope: RopeConfig
    context_length: int
    longer: LongerContext | None = None  # for launches that ask for a longer context
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # norms scale by offset + weight
    sandwich_norms: bool = False  # norms after attention and after the MLP, too
    tie_embeddings: bool = False
    copies_head: bool = False  # a tied head is held in the weight scheme, beside the embedding
    embed_scale: float = 1.0  # factor of the embedded tokens
    branch_scale: float = 1.0  # factor of what attention and MLP add to the residual stream
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rope
    activation: Activation = "silu"
    gate_limit: float | None = None  # upper bound of gate; up is clipped to [-gate_limit, gate_limit]
    mla: MlaConfig | None = None  # in place of q, k and v; num_kv_heads is 1
    moe: MoeConfig | None = None
    moe_layers: tuple[bool, ...] | None = None  # per layer, whether it has experts; None: all have, if moe
    sliding_windows: tuple[int | None, ...] | None = None  # per layer; None: full attention in every layer
    local_rope: RopeConfig | None = None  # rope of `local_layers`, where some have another
    local_layers: tuple[bool, ...] = ()
    attn_sinks: bool = False  # each head has a logit that takes weight from the keys
    attn_logit_softcap: float | None = None
    attn_temperature_length: int | None = None  # beyond it, capped scores grow with the log of the position
    logit_scale: float = 1.0
    final_logit_softcap: float | None = None
    query_scale: float | None = None  # None: head_dim ** -0.5
    logn_scaling: LognScaling | None = None
    weight_format: WeightFormat | None = None  # in which matrices are stored; None: plain floats
    wide: tuple[str, ...] = ()  # paths of the matrices that a quantised checkpoint holds as plain floats
    weight_scheme: Scheme | None = None  # in which they are held; None: plain floats
    kv_dtype: str | None = None  # dtype of the KV pool; None: that of activations
    normalised_head: bool = False  # loading divides the head's columns by their lengths
    eos_token_ids: tuple[int, ...] = ()
    # Number of devices that hold the same head as this shard, where there are more devices than heads. All of them attend
    # with it, and each projects a part of its output.
    head_replicas: int = 1
    part_of: str | None = None  # class of the larger model whose text model this is; its other tensors are left out
    num_mtp_layers: int = 0  # multi-token prediction; they are stored after the last layer
    draft: DraftConfig | None = None  # the model that drafts tokens for this one
    pooling: Literal["last", "mean"] | None = (
        None  # the state or states of which vectors are made; None: logits are, by a head
    )

    def for_context(self, length: int | None) -> DecoderConfig:
        """Return the model for contexts of this length, None for the usual one; longer ones have another rope."""
        if self.longer is None or (length or 0) <= self.context_length:
            return self
        return dataclasses.replace(self, context_length=self.longer.length, rope=self.longer.rope, longer=None)

    def window(self, layer: int) -> int | None:
        """Return how many tokens a query of this layer sees, itself included; None: all before it."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and (self.moe_layers is None or self.moe_layers[layer])

    def has_mlp(self, layer: int) -> bool:
        return not self.has_experts(layer) or (self.moe is not None and self.moe.residual_scale is not None)

    @property
    def scales_kv(self) -> bool:
        """Whether each layer has scales for K and V: those of a pool of eight bits."""
        return self.kv_dtype not in (None, "bfloat16")

    def layer_groups(self) -> tuple[int, ...]:
        """Return the sizes of the runs of layers with the same weights, in order. Each run can be stacked."""

        def kind(layer: int) -> tuple[bool, list[str]]:
            wide = self.wide if self.weight_scheme else ()
            return self.has_experts(layer), sorted(p.split("].")[1] for p in wide if p.startswith(f".layers[{layer}]."))

        runs = itertools.groupby(range(self.num_layers), kind)
        return tuple(len(list(layers)) for _, layers in runs)

    def shard(self, grid: Grid) -> DecoderConfig:
        """Return the model that one of the grid's devices holds: its heads, its part of the MLP, of the experts and of
        the vocabulary.

        Raises ValueError if these cannot be divided evenly. Heads may be fewer than devices, which then hold replicas.
        """
        everyone, moe = grid.num_devices, self.moe
        replicas = max(1, grid.tensor // self.num_heads)
        _must_divide("--tp-size", grid.tensor, "attention heads", self.num_heads * replicas)
        _must_divide("--tp-size over the attention heads", replicas, "values of a head", self.output_dim)
        if self.num_kv_heads % grid.tensor and grid.tensor % self.num_kv_heads:
            raise ValueError(
                f"--tp-size is {grid.tensor}; it must divide, or be a multiple of, {self.num_kv_heads} KV heads"
            )
        over_all = "--tp-size" if grid.data == 1 else "--tp-size times --dp-size"
        if any(map(self.has_mlp, range(self.num_layers))):
            _must_divide(over_all, everyone, "MLP neurons", self.intermediate_size)
        _must_divide(over_all, everyone, "vocabulary entries", self.vocab_size)
        if everyone % grid.expert:
            raise ValueError(f"--ep-size is {grid.expert}; it must divide the {everyone} devices")
        if grid.expert > 1 and not moe:
            raise ValueError(f"--ep-size is {grid.expert}; {self.architecture} has no experts to spread, leave it out")
        if moe:
            _must_divide("--ep-size", grid.expert, "experts", moe.num_experts)
            _must_divide(f"{over_all} over --ep-size", grid.expert_width, "neurons of an expert", moe.intermediate_size)
            _must_divide(over_all, everyone, "neurons of the shared expert", moe.shared_intermediate_size)
            moe = dataclasses.replace(
                moe,
                intermediate_size=moe.intermediate_size // grid.expert_width,
                shared_intermediate_size=moe.shared_intermediate_size // everyone,
                expert_groups=grid.expert,
            )
        return dataclasses.replace(
            self,
            num_heads=max(1, self.num_heads // grid.tensor),
            head_replicas=replicas,
            num_kv_heads=max(1, self.num_kv_heads // grid.tensor),
            intermediate_size=self.intermediate_size // everyone,
            vocab_size=self.vocab_size // everyone,
            moe=moe,
            draft=self.draft and self.draft.shard(grid),
        )

    @property
    def key_dim(self) -> int:
        """Width of a key, as the pool has it and attention multiplies it with queries."""
        return self.mla.latent_dim if self.mla else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of the vectors that attention sums: a value, or the part of a latent key that makes the values."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    @property
    def output_dim(self) -> int:
        """Width of a head's output."""
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def scale(self) -> float:
        return self.query_scale if self.query_scale is not None else self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Description of a draft model, which runs inside the target's step, on the target's tokens, rows and pages.

    Its input at position p is the token there and a feature of position p - 1, which is made of the target's states or, after
    the row's last token, of its own output.
    """

    # How the first layer's input is made of token and feature:
    # eagle: fc([token, feature]) (EAGLE-1 and 2, https://arxiv.org/abs/2401.15077); the first layer has no attn_norm;
    # eagle3: [attn_norm(token), feature_norm(feature)] goes to attention, beside the feature as the residual stream
    # (https://arxiv.org/abs/2503.01840); the feature is fc of several states;
    # mtp: fc([embed_norm(token), feature_norm(feature)]) (DeepSeek V3, https://arxiv.org/abs/2412.19437);
    # standalone: the token alone.
    kind: Literal["eagle", "eagle3", "mtp", "standalone"]
    decoder: DecoderConfig  # its layers; vocab_size is the number of ids that it can draft, V'
    # Target layers whose inputs are joined to the feature, L being the output of the last; (): the output after the final norm.
    target_layers: tuple[int, ...] = ()
    own_embed: bool = False  # else it takes the target's
    own_head: bool = False
    is_reduced: bool = False  # it drafts some of the target's ids only, by a table of offsets (d2t)
    fc_bias: bool = False
    norm_before_fc: bool = False  # one norm over the joined features
    fc_norms: bool = False  # a norm for each of the joined features
    norm_before_residual: bool = False  # eagle3: the residual stream is the normed feature
    recycles_normed: bool = False  # the feature of a drafted token is the output after the final norm

    @property
    def num_features(self) -> int:
        """States that are joined to a feature, F."""
        return max(1, len(self.target_layers))

    def shard(self, grid: Grid) -> DraftConfig:
        """Return the part of one of the grid's devices, as DecoderConfig.shard. A head may lack the experts that its target has."""
        of_own = grid if self.decoder.moe else dataclasses.replace(grid, expert=1)
        try:
            return dataclasses.replace(self, decoder=self.decoder.shard(of_own))
        except ValueError as error:
            raise ValueError(f"the draft model cannot be divided: {error}") from error


def _must_divide(flag: str, divisor: int, what: str, number: int) -> None:
    if number % divisor:
        raise ValueError(f"{flag} is {divisor}; it must divide the model's {number} {what}")
