"""The shape of the KV pool: `[L * P, heads, planes, page, width]`, one array for all layers."""

from __future__ import annotations

import dataclasses

from sgl_jax.models.config import DecoderConfig
from sgl_jax.ops.attention.backends import Backend

KV_AXES = ("pages", "kv_heads", None, None, None)  # logical axes; each data rank has pages of its own


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a token keeps in the pool, on one device."""

    num_layers: int
    num_heads: int
    planes: int  # K and V; 1 where values are a part of the keys
    width: int  # of a head, as the attention backend stores it

    @property
    def values_per_token(self) -> int:
        """In all layers."""
        return self.num_layers * self.num_heads * self.planes * self.width

    def shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        return (self.num_layers * num_pages, self.num_heads, self.planes, page_size, self.width)


def pool_of(share: DecoderConfig, attention: Backend) -> Pool:
    """The pool of a model, or of one device's share of it."""
    planes = 1 if share.mla else 2
    return Pool(share.num_layers, share.num_kv_heads, planes, attention.pool_head_dim(share.key_dim))
