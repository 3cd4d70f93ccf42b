"""Reference of grouped matmul, row by row in float64 numpy. For tests."""

import numpy as np


def grouped_matmul(x, w, layer, group_sizes):
    """Multiply x [M, I] with w [L, E, O, I] by group_sizes [E]. Returns [M, O]; rows past the last group are zero."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)[layer]
    out = np.zeros((len(x), w.shape[1]))
    groups = np.repeat(np.arange(len(w)), np.asarray(group_sizes))
    for row, group in enumerate(groups):
        out[row] = w[group] @ x[row]
    return out
