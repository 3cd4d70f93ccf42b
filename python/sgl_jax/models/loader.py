"""Fills the declared weights: from a checkpoint, tensor by tensor, or with random numbers.

Each weight is put together in one host buffer of the target dtype, handed to `place` and forgotten, so beside the
placed weights only the few being worked on are in memory. Threads do the copying (numpy releases the GIL); `place` and
`report` are called from the caller's thread, in an order that depends on the model alone.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np

from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.families import tensor_names
from sgl_jax.models.plan import Leaf, plan_weights
from sgl_jax.models.weights import Weights, WeightSpec, declare

Place = Callable[[WeightSpec, np.ndarray], Any]
Report = Callable[[float, int], None]  # fraction done, bytes of the checkpoint done

BLOCK_VALUES = 1 << 20  # converted at a time
_RANDOM_VALUES = 1_048_573  # prime
_ALIGNMENT = 64  # jax on a CPU adopts a buffer so aligned instead of copying it


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: Any,
    *,
    rounded_to: Any = None,
    place: Place | None = None,
    report: Report | None = None,
) -> Weights:
    """Raises one ModelError that lists every missing, surplus and misshapen tensor, before any of them is read.

    `rounded_to` rounds every value to that dtype before it is stored as `dtype`: float32 arithmetic on bfloat16 weights.
    """
    dtype, rounded = np.dtype(dtype), None if rounded_to is None else np.dtype(rounded_to)
    leaves = plan_weights(checkpoint.tensors, config, tensor_names(config), source=str(checkpoint.path))
    leaves.sort(key=lambda leaf: leaf.path.startswith(".layers"))  # the two big ones first, at the same time
    total = sum(leaf.nbytes for leaf in leaves)
    placed, done = {}, 0
    for leaf, array in _ahead(leaves, lambda leaf: _assemble(leaf, dtype, rounded)):
        placed[leaf.path] = (place or place_on_default_device)(leaf.spec, array)
        done += leaf.nbytes
        if report is not None:
            report(done / total, round(done / total * checkpoint.total_bytes))
    return _fill(config, placed)


def random_weights(
    config: DecoderConfig,
    dtype: Any,
    seed: int = 0,
    *,
    place: Place | None = None,
    report: Report | None = None,
) -> Weights:
    """Small random weights (--load-format dummy): norms are 1, the rest normal with deviation 0.02."""
    dtype = np.dtype(dtype)
    paths = jax.tree_util.tree_flatten_with_path(declare(config))[0]
    leaves = [Leaf(jax.tree_util.keystr(path), spec, ()) for path, spec in paths]
    total = sum(math.prod(leaf.spec.shape) for leaf in leaves)

    # Drawing billions of normals takes minutes; reading a million over and over, from another start each time, does not.
    # The prime length keeps the rows of a matrix apart.
    normal = np.random.Generator(np.random.SFC64(seed)).standard_normal(_RANDOM_VALUES, np.float32)
    values = _plain((normal * np.float32(0.02)).astype(dtype))

    def draw(indexed: tuple[int, Leaf]) -> np.ndarray:
        index, leaf = indexed
        out = aligned_empty(leaf.spec.shape, dtype)
        if leaf.path.endswith("norm"):
            out[...] = 1
            return out
        flat, at = (
            _plain(out).reshape(-1),
            int(np.random.Generator(np.random.SFC64([seed, index])).integers(values.size)),
        )
        filled = 0
        while filled < flat.size:
            count = min(values.size - at, flat.size - filled)
            flat[filled : filled + count] = values[at : at + count]
            filled, at = filled + count, (at + count) % values.size
        return out

    placed, done = {}, 0
    for (_, leaf), array in _ahead(list(enumerate(leaves)), draw):
        placed[leaf.path] = (place or place_on_default_device)(leaf.spec, array)
        done += math.prod(leaf.spec.shape)
        if report is not None:
            report(done / total, done * dtype.itemsize)
    return _fill(config, placed)


def place_on_default_device(spec: WeightSpec, array: np.ndarray) -> jax.Array:
    del spec
    return jax.device_put(array)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(config: DecoderConfig, placed: dict[str, Any]) -> Weights:
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[jax.tree_util.keystr(path)], declare(config))


def _ahead[T](items: list[T], work: Callable[[T], np.ndarray]) -> Iterator[tuple[T, np.ndarray]]:
    """Works on a few items at a time in threads and yields the results in order."""
    workers = min(16, os.cpu_count() or 1)
    running: deque[tuple[T, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        try:
            for item in items:
                running.append((item, pool.submit(work, item)))
                if len(running) > workers:
                    first, future = running.popleft()
                    yield first, future.result()
            while running:
                first, future = running.popleft()
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _assemble(leaf: Leaf, dtype: np.dtype, rounded: np.dtype | None) -> np.ndarray:
    """The weight's pieces one below the other, a block of rows at a time so that conversions stay in the cache."""
    out = aligned_empty(leaf.spec.shape, dtype)
    one_by_one = leaf.spec.num_experts is not None and len(leaf.pieces[0].shape) < out.ndim  # experts' tensors
    lines = _plain(out).reshape(-1, *out.shape[2:]) if one_by_one else _plain(out)
    row = 0
    for piece in leaf.pieces:
        step = max(1, BLOCK_VALUES // math.prod(piece.shape[1:]))
        for start in range(0, piece.shape[0], step):
            rows = _cast(piece.rows(start, min(start + step, piece.shape[0])), dtype, rounded)
            lines[row + start : row + start + len(rows)] = _plain(rows)
        row += piece.shape[0]
    return out


def _cast(rows: np.ndarray, dtype: np.dtype, rounded: np.dtype | None) -> np.ndarray:
    if rounded is not None:
        rows = rows.astype(rounded, copy=False)
    return rows.astype(dtype, copy=False)


def _plain(x: np.ndarray) -> np.ndarray:
    """bfloat16 seen as integers: numpy copies its own types faster than foreign ones."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x
