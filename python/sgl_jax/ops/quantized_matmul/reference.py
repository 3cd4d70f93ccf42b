"""Reference of quantised products, column by column in float64 numpy. For tests."""

import numpy as np


def matrix(values, scales, offsets=None):
    """Return w [O, I] of values [O, I], and scales and offsets [O, G]."""
    values, scales = np.asarray(values).astype(np.float64), np.asarray(scales, np.float64)
    offsets = np.zeros_like(scales) if offsets is None else np.asarray(offsets, np.float64)
    group = values.shape[1] // scales.shape[1]
    columns = [values[:, i] * scales[:, i // group] - offsets[:, i // group] for i in range(values.shape[1])]
    return np.stack(columns, axis=1)


def quantized_matmul(x, values, scales, offsets=None):
    """Multiply each token of x [T, I] with each row of the matrix. Returns [T, O]."""
    return np.asarray(x).astype(np.float64) @ matrix(values, scales, offsets).T


def quantized_grouped_matmul(x, values, scales, layer, group_sizes, offsets=None):
    """Multiply x [M, I] with planes [L, E, O, …] by group_sizes [E]. Returns [M, O]; rows past the last group are zero."""
    out = np.zeros((len(x), values.shape[2]))
    first = 0
    for group, size in enumerate(np.asarray(group_sizes)):
        planes = [None if plane is None else plane[layer, group] for plane in (values, scales, offsets)]
        out[first : first + size] = quantized_matmul(x[first : first + size], *planes)
        first += size
    return out
