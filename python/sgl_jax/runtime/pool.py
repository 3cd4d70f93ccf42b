"""Shape of the KV pool: one array for all layers, with pages along its first axis. Each data rank has its own pages."""

import dataclasses

import numpy as np

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.ops.attention.backends import Backend, PoolOrder


@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values that a device keeps of each token."""

    num_layers: int
    num_heads: int
    planes: int  # 2, K and V; 1 if values are a part of the keys
    width: int  # values of a head, as the attention backend stores it
    order: PoolOrder
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token takes in all layers."""
        values = self.num_layers * self.num_heads * self.planes * self.width
        return values * np.dtype(self.dtype).itemsize

    def shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """Return the shape of the pool, with `num_pages` pages in each layer."""
        page = self.order.page(self.num_heads, self.planes, page_size, self.width, np.dtype(self.dtype))
        return (self.num_layers * num_pages, *page)


def pools_of(shard: DecoderConfig, attention: Backend, dtype: str) -> tuple[Pool, ...]:
    """Return the pool of a model, or of one device's shard of it, and that of its draft model, which has the same pages. Draft
    layers whose KV has the target's shape are the last layers of its pool."""
    own = _pool_of(shard, attention, dtype)
    if shard.draft is None:
        return (own,)
    drafts = _pool_of(shard.draft.decoder, attention, dtype)
    if dataclasses.replace(drafts, num_layers=own.num_layers) == own:
        return (dataclasses.replace(own, num_layers=own.num_layers + drafts.num_layers),)
    return own, drafts


def _pool_of(shard: DecoderConfig, attention: Backend, dtype: str) -> Pool:
    planes = 1 if shard.mla else 2
    width = attention.pool_head_dim(shard.key_dim)
    held = shard.kv_dtype or dtype
    return Pool(shard.num_layers, shard.num_kv_heads, planes, width, attention.pool_order, held)
