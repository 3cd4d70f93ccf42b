"""Paged attention on CPUs by a compiled library (ops/cpu/attention.cc): one call of XLA's foreign-function interface in each layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.ops.attention.api import AnyPool, AttentionLayer, NewKV, Output, Pool, Queries, RaggedBatch
from sgl_jax.ops.cpu.library import Library

_OF_THE_SYSTEM = 1 << 26  # bytes of an array for which the C library asks the system, which gives zeros
_EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
_ALL_KEYS = 2**31 - 1  # the window of a layer that has none


def paged_attention(
    q: Queries,
    k: NewKV,
    v: NewKV | None,
    kv: Pool,
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    library: Library,
) -> tuple[Output, Pool]:
    """See api.Attention. Outputs of padding and of missing tokens are 0, and nothing is written for them.

    Raises ValueError for queries other than float32 and bfloat16, and for a pool that has neither their dtype nor 8 bits.
    """
    if q.dtype not in (jnp.float32, jnp.bfloat16) or kv.dtype not in (q.dtype, *_EIGHT_BITS):
        raise ValueError(
            f"--attention-backend cpu: the KV pool is {kv.dtype} and the queries {q.dtype}; these must be float32 or bfloat16, "
            "and the pool like them, int8, float8_e4m3fn or float8_e5m2; use native"
        )
    spec = layer.spec
    if layer.prepare is not None:
        q, k = layer.prepare(q, k)
    window = _ALL_KEYS if layer.window is None else layer.window
    sinks = jnp.empty(0) if layer.sinks is None else layer.sinks
    out = jax.ShapeDtypeStruct((*q.shape[:2], q.shape[2] if spec.value_dim is None else spec.value_dim), q.dtype)
    attend = jax.ffi.ffi_call(
        library.attention, (out, jax.ShapeDtypeStruct(kv.shape, kv.dtype)), input_output_aliases={3: 1}
    )
    out, kv = attend(
        q,
        k,
        k[:0] if v is None else v,
        kv,
        batch.page_table,
        batch.kv_lens,
        batch.cu_q_lens,
        jnp.zeros(len(batch.kv_lens), jnp.int32) if batch.num_missing is None else batch.num_missing,
        jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer.first_page, window)]),
        jnp.stack([jnp.asarray(x, jnp.float32) for x in layer.scales]),
        sinks.astype(jnp.float32),
        scale=np.float32(spec.scale),
        softcap=np.float32(spec.softcap or 0),
        log_length=np.float32(math.log(spec.temperature_length) if spec.temperature_length else 0),
        first_key=np.int32(spec.first_key),
    )
    return out, kv


def make_pool(shape: tuple[int, ...], dtype: str, *, library: Library) -> AnyPool:
    """Return zeros. Pages of a large pool take memory and time when they are first written; another allocator than the C
    library's may leave other values there, which nothing reads before it writes."""
    if math.prod(shape) * np.dtype(dtype).itemsize < _OF_THE_SYSTEM:
        return jnp.zeros(shape, dtype)
    return jax.ffi.ffi_call(library.untouched, jax.ShapeDtypeStruct(shape, dtype))()
