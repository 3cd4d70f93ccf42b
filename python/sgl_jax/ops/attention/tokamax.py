"""The backend `tokamax`: that package's batched ragged paged attention, found by an entry point like any other backend.

Its kernels keep K and V of a token side by side, `[LP, page, 2 K / packing, packing, H]`, where packing is how many values
share 32 bits, and write the new KV themselves.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from sgl_jax.ops.attention.api import AnyPool, AttentionLayer, NewKV, Output, Queries, RaggedBatch
from sgl_jax.ops.attention.backends import Backend, PoolOrder

try:
    from tokamax.ops.tpu import BatchedRpa, BatchedRpaConfig
except ImportError as problem:
    raise ImportError(f"tokamax cannot be imported ({problem}); it needs `pip install tokamax`") from problem

_KERNELS = BatchedRpa(bypass_device_check=True)  # programs are compiled where there is no TPU, too
_LANES = 128
_SCALARS = 1 / 2  # fraction of scalar memory the page table may fill: the kernels need the rest for their work list
_STEPS = 15 * 128  # capacity of the work list: it has 16 lines of 128, and the last one is not used
_KEYS = 512, 1024, 2048, 4096  # block sizes to try, in keys


def paged_attention(
    q: Queries,
    k: NewKV | None,
    v: NewKV | None,
    kv: AnyPool,
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    op: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[Output, AnyPool]:
    """See api.Attention; the pool is ordered as `backend.pool_order` says. `op`: another than the kernels (for tests).

    Raises ValueError for features its kernels lack.
    """
    spec = layer.spec
    refused = {
        "sliding windows": layer.window is not None,  # tokamax takes one constant; ours differ by layer
        "attention sinks": layer.sinks is not None,
        "scores that grow with the position": spec.temperature_length is not None,
        "8-bit KV": layer.kv_scales is not None or kv.dtype.itemsize == 1,
        "latent pools": spec.value_dim is not None,
        # Its option decode_query_size might serve them, which is untested: its kernels run on a TPU only.
        f"decoding rows of {spec.width} tokens": spec.width > 1,
        f"keys that begin at position {spec.first_key}": spec.first_key > 0,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"--attention-backend tokamax cannot do {what}; use fa or native")
    if k is None or v is None:
        raise ValueError("--attention-backend tokamax takes q, k and v apart")
    page_size = kv.shape[1]
    if page_size & (page_size - 1):
        raise ValueError(f"--attention-backend tokamax needs --page-size to be a power of two; it is {page_size}")
    if op is None:
        op = _sized(kv.shape, kv.dtype.itemsize, batch.page_table.shape, len(q))
    if layer.prepare is not None:
        q, k = layer.prepare(q, k)
    num_short = batch.num_short.reshape(1)
    num_rows = jnp.sum(batch.cu_q_lens[1:] > batch.cu_q_lens[:-1], dtype=jnp.int32).reshape(1)
    return op(
        q,
        k.astype(kv.dtype),
        v.astype(kv.dtype),
        kv,
        batch.kv_lens,
        (batch.page_table + layer.first_page).reshape(-1),
        batch.cu_q_lens,
        jnp.concatenate([num_short, num_short, num_rows]),  # ends of decoding, equally long and other rows
        sm_scale=spec.scale,
        soft_cap=spec.softcap,
    )


def _sized(kv_shape: tuple[int, ...], itemsize: int, table_shape: tuple[int, ...], num_tokens: int) -> BatchedRpa:
    """Return the operation with the smallest blocks of keys whose work list holds the worst possible step.

    The list has a fixed size, and the kernels write further steps past its end.
    """
    _, page_size, pairs, packing, width = kv_shape
    rows, pages = table_shape
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:  # no TPU to compile for
        return _KERNELS
    default = BatchedRpaConfig()
    fits = rows * pages * 4 <= _SCALARS * chip.smem_capacity_bytes
    for keys in _KEYS if fits else ():
        blocks = -(-pages * page_size // keys)
        chunks = -(-num_tokens // default.prefill_bq_sz) + min(rows, num_tokens // 2)  # a row's end splits a tile
        steps = blocks * max(-(-rows // default.decode_batch_size), -(-chunks // default.prefill_batch_size))
        buffers = default.decode_batch_size * default.n_buffer * keys * pairs * packing * width * itemsize
        if steps <= _STEPS and buffers <= chip.vmem_capacity_bytes // 2:
            return _KERNELS.replace(config=dataclasses.replace(default, bkv_sz=keys))
    raise ValueError(
        f"--attention-backend tokamax keeps all page ids and a list of all work in memory of fixed size: {rows} rows of "
        f"{pages} pages of {page_size} and {num_tokens} tokens a step are too many; lower --max-running-requests, "
        f"--context-length or --chunked-prefill-size, or use fa"
    )


def _page(heads: int, planes: int, page_size: int, width: int, dtype: DTypeLike) -> tuple[int, ...]:
    packing = 4 // np.dtype(dtype).itemsize
    return page_size, -(-heads * planes // packing), packing, width


backend = Backend(
    paged_attention,
    platforms=frozenset({"tpu"}),
    pool_head_dim=lambda head_dim: -(-head_dim // _LANES) * _LANES,
    page_multiple=lambda dtype: 16,
    page_size=128,
    pool_order=PoolOrder(_page, ("pages", None, "kv_heads", None, None)),
)
