"""What paged attention means: one row at a time, dense, float64 numpy. For tests."""

from __future__ import annotations

import numpy as np


def paged_attention(
    q,
    k,
    v,
    kv,
    page_table,
    start,
    num_new,
    *,
    first_page=0,
    scale,
    window=None,
    softcap=None,
    sinks=None,
    temperature_length=None,
    kv_scales=None,
    value_dim=None,
):
    """q [T, N, H], k and v [T, K, H], kv [LP, K, 2, page, H], page_table [S, pages], start and num_new [S].

    Returns (o [T, N, H], kv): tokens beyond the rows' are zero. With kv_scales, k and v are what the pool is to hold. With
    value_dim, v is None, kv [LP, K, 1, page, H] and o [T, N, value_dim].
    """
    q, k, kv = (np.array(x, np.float64) for x in (q, k, kv))
    k_scale, v_scale = kv_scales or (1.0, 1.0)
    v_scale = k_scale if value_dim else v_scale
    page_size, group = kv.shape[3], q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], value_dim or q.shape[2]))
    token = 0
    for row, (s, n) in enumerate(zip(np.asarray(start), np.asarray(num_new), strict=True)):
        for i in range(n):
            page = first_page + page_table[row][(s + i) // page_size]
            kv[page, :, 0, (s + i) % page_size] = k[token + i]
            if value_dim is None:
                kv[page, :, 1, (s + i) % page_size] = v[token + i]
        pages = first_page + np.asarray(page_table[row][: -(-(s + n) // page_size)])
        if n == 0:
            continue
        cached = np.concatenate(list(kv[pages]), axis=2)  # [K, 2, pages * page, H]
        for i in range(n):
            last = s + i
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(q.shape[1]):
                keys = cached[head // group, 0, first : last + 1]
                values = keys[:, :value_dim] if value_dim else cached[head // group, 1, first : last + 1]
                scores = keys @ q[token + i, head] * (scale * k_scale)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if temperature_length is not None and last > temperature_length:
                    scores *= np.log(last) / np.log(temperature_length)
                sink = -np.inf if sinks is None else float(sinks[head])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[token + i, head] = v_scale * (weights @ values) / (weights.sum() + np.exp(sink - top))
        token += n
    return out, kv
