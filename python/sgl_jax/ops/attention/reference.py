"""The meaning of paged attention: one row at a time, dense, float64 numpy. For tests."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from sgl_jax.ops.attention.api import AttentionLayer, RaggedBatch, to_pool

_Numbers = Array | np.ndarray


def paged_attention(
    q: Float[_Numbers, "T N H"],
    k: Float[_Numbers, "T K H"],
    v: Float[_Numbers, "T K H"] | None,
    kv: Num[_Numbers, "LP K planes page H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
) -> tuple[Float[np.ndarray, "T N V"], Float[np.ndarray, "LP K planes page H"]]:
    """See api.Attention, for arrays of numbers; padding has outputs of zero, and nothing is written for it."""
    spec = layer.spec
    if layer.prepare is not None:
        q, k = layer.prepare(jnp.asarray(q), jnp.asarray(k))
    k_scale, v_scale = (float(x) for x in layer.scales)
    if layer.kv_scales is not None:
        k = to_pool(jnp.asarray(k), kv.dtype, k_scale)
        v = None if v is None else to_pool(jnp.asarray(v), kv.dtype, v_scale)
    new = [np.array(x, np.float64) for x in (k, v) if x is not None]
    q, kv = np.array(q, np.float64), np.array(kv, np.float64)
    value_dim = q.shape[2] if spec.value_dim is None else spec.value_dim
    page_size, group, first_page = kv.shape[3], q.shape[1] // kv.shape[1], int(layer.first_page)
    out = np.zeros((*q.shape[:2], value_dim))
    table, kv_lens, cu = (np.asarray(x) for x in (batch.page_table, batch.kv_lens, batch.cu_q_lens))
    for row, pages in enumerate(table + first_page):
        tokens = range(cu[row], cu[row + 1])
        position = kv_lens[row] - cu[row + 1]  # a token's position minus its index
        for token in tokens:
            page, offset = divmod(position + token, page_size)
            for plane, x in enumerate(new):
                kv[pages[page], :, plane, offset] = x[token]
        if not tokens:
            continue
        own = pages[: -(-kv_lens[row] // page_size)]
        cached = np.concatenate(list(kv[own]), axis=2)  # [K, planes, pages * page, H]
        for token in tokens:
            last = position + token
            first = max(spec.first_key, 0 if layer.window is None else last - int(layer.window) + 1)
            if first > last:
                continue
            logn = 1.0
            if spec.temperature_length is not None and last > spec.temperature_length:
                logn = np.log(last) / np.log(spec.temperature_length)
            for head in range(q.shape[1]):
                seen = cached[head // group, :, first : last + 1]
                scores = seen[0] @ q[token, head] * (spec.scale * k_scale)
                if spec.softcap is not None:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                scores *= logn
                sink = -np.inf if layer.sinks is None else float(layer.sinks[head])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                summed = weights @ seen[-1][:, :value_dim]
                out[token, head] = v_scale * summed / (weights.sum() + np.exp(sink - top))
    return out, kv
