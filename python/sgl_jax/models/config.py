"""The switches in which decoder families differ. A family file fills them from config.json; the decoder reads them."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding, resolved: `inv_freq[i]` rotates pair i by position * inv_freq[i] (half-split pairs)."""

    inv_freq: tuple[float, ...]  # [rotary_dim / 2]
    attention_factor: float = 1.0  # YaRN's scale on cos and sin


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One frozen description of any decoder we serve. Letters as in docs/architecture.md."""

    architecture: str  # the Hugging Face class name
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope: RopeConfig
    context_length: int
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before rope
    activation: Literal["silu", "gelu_tanh"] = "silu"
    sliding_windows: tuple[int | None, ...] | None = None  # per layer; None: full attention in every layer
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    query_scale: float | None = None  # None: head_dim ** -0.5
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a query of this layer sees; None: all before it."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def share(self, devices: int) -> DecoderConfig:
        """What one of `devices` tensor-parallel devices holds: its heads, its part of the MLP and of the vocabulary.

        Raises ValueError if the heads, the MLP or the vocabulary cannot be divided evenly; KV heads may be fewer than
        devices, which then hold copies.
        """
        for what, number in (
            ("attention heads", self.num_heads),
            ("MLP neurons", self.intermediate_size),
            ("vocabulary entries", self.vocab_size),
        ):
            if number % devices:
                raise ValueError(f"--tp-size is {devices}; it must divide the model's {number} {what}")
        if self.num_kv_heads % devices and devices % self.num_kv_heads:
            raise ValueError(
                f"--tp-size is {devices}; it must divide or be a multiple of the {self.num_kv_heads} KV heads"
            )
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // devices,
            num_kv_heads=max(1, self.num_kv_heads // devices),
            intermediate_size=self.intermediate_size // devices,
            vocab_size=self.vocab_size // devices,
        )

    @property
    def scale(self) -> float:
        return self.query_scale if self.query_scale is not None else self.head_dim**-0.5
