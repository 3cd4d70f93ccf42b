"""Plain counterparts of reading: the shard of a whole array, and an array as a stored tensor."""

from __future__ import annotations

import numpy as np

from sgl_jax.models.shard import Shard, as_slice
from sgl_jax.models.stored import StoredTensor


def cut(array: np.ndarray, shard: Shard) -> np.ndarray:
    """Return the shard of a whole weight."""
    whole = array.reshape(-1, *array.shape[-(1 if shard.columns is None else 2) :])[as_slice(shard.experts)]
    rows = np.concatenate([whole[:, as_slice(run)] for run in shard.rows], axis=1)
    found = rows if shard.columns is None else rows[..., as_slice(shard.columns)]
    return found.reshape(-1, *found.shape[2:]) if array.ndim < whole.ndim else found


def in_memory(name: str, array: np.ndarray) -> StoredTensor:
    """Describe an array as if it were stored."""
    return StoredTensor(name, array.shape, array.dtype.name, array.nbytes, lambda start, stop: array[start:stop])
