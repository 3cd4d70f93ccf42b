"""Fills the declared weights: from a checkpoint, tensor by tensor, or with random numbers.

Each weight is put together in one host buffer of the target dtype, handed to `place` and forgotten, so beside the
placed weights only the few being worked on are in memory. Threads do the copying (numpy releases the GIL); `place` and
`report` are called from the caller's thread, in an order that depends on the model alone. Of a weight that is divided
over devices only the shares of this process's devices are read.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np

from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.families import tensor_names
from sgl_jax.models.plan import Leaf, plan_weights
from sgl_jax.models.share import Share, as_slice, share_of
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.weights import Weights, WeightSpec, declare
from sgl_jax.parallel.grid import LONE

Report = Callable[[float, int], None]  # fraction done, bytes of the checkpoint done


class Placer(Protocol):
    """Which parts of each weight are wanted here, and where they go."""

    def shares(self, spec: WeightSpec) -> Sequence[Share]: ...

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> Any:
        """The weight from its shares, in their order; the arrays are the placer's from here on."""
        ...


class OneDevice:
    """Whole weights on the default device."""

    def shares(self, spec: WeightSpec) -> Sequence[Share]:
        return [share_of(spec, LONE, 0)]

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> jax.Array:
        (array,) = arrays
        return jax.device_put(array)


BLOCK_VALUES = 1 << 20  # converted at a time
_RANDOM_VALUES = 1_048_573  # prime
_ALIGNMENT = 64  # jax on a CPU adopts a buffer so aligned instead of copying it


def load_weights(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: Any,
    *,
    rounded_to: Any = None,
    placer: Placer | None = None,
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
    placer = placer or OneDevice()

    def assemble(leaf: Leaf) -> list[np.ndarray]:
        return [_assemble(leaf, share, dtype, rounded) for share in placer.shares(leaf.spec)]

    for leaf, arrays in _ahead(leaves, assemble):
        placed[leaf.path] = placer.place(leaf.spec, arrays)
        done += leaf.nbytes
        if report is not None:
            report(done / total, round(done / total * checkpoint.total_bytes))
    return _fill(config, placed)


def random_weights(
    config: DecoderConfig,
    dtype: Any,
    seed: int = 0,
    *,
    placer: Placer | None = None,
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

    placer = placer or OneDevice()

    def draw(indexed: tuple[int, Leaf]) -> list[np.ndarray]:
        whole = draw_whole(*indexed)
        return [share.of(whole) for share in placer.shares(indexed[1].spec)]

    def draw_whole(index: int, leaf: Leaf) -> np.ndarray:
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
    for (_, leaf), arrays in _ahead(list(enumerate(leaves)), draw):
        placed[leaf.path] = placer.place(leaf.spec, arrays)
        done += math.prod(leaf.spec.shape)
        if report is not None:
            report(done / total, done * dtype.itemsize)
    return _fill(config, placed)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(config: DecoderConfig, placed: dict[str, Any]) -> Weights:
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[jax.tree_util.keystr(path)], declare(config))


def _ahead[T, R](items: list[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Works on a few items at a time in threads and yields the results in order."""
    workers = min(16, os.cpu_count() or 1)
    running: deque[tuple[T, Future[R]]] = deque()
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


def _assemble(leaf: Leaf, share: Share, dtype: np.dtype, rounded: np.dtype | None) -> np.ndarray:
    """The share of a weight, put together from its pieces a block of rows at a time so that conversions stay in the cache."""
    shape = share.shape if leaf.spec.num_experts is not None else share.shape[1:]
    out = aligned_empty(shape, dtype)
    lines = _plain(out).reshape(-1, *share.shape[2:])
    row = 0
    for block in _blocks(leaf, share):
        rows = block if share.columns is None else block[:, as_slice(share.columns)]
        lines[row : row + len(rows)] = _plain(_cast(rows, dtype, rounded))
        row += len(rows)
    return out


def _blocks(leaf: Leaf, share: Share) -> Iterator[np.ndarray]:
    """The share's rows in order, columns whole."""
    per_expert = len(leaf.pieces) // (leaf.spec.num_experts or 1)
    fused = leaf.spec.num_experts is not None and len(leaf.pieces[0].shape) == len(leaf.spec.shape)
    for expert in share.experts:
        if fused:  # one tensor has the matrices of all experts
            (piece,) = leaf.pieces
            (matrix,) = piece.rows(expert, expert + 1)
            yield from (matrix[as_slice(run)] for run in share.rows)
        else:
            yield from _rows(leaf.pieces[expert * per_expert : (expert + 1) * per_expert], share.rows)


def _rows(pieces: Sequence[StoredTensor], runs: Sequence[range]) -> Iterator[np.ndarray]:
    """Runs of the rows of tensors that lie one below the other."""
    ends = list(itertools.accumulate(piece.shape[0] for piece in pieces))
    for run in runs:
        for piece, end in zip(pieces, ends, strict=True):
            first = end - piece.shape[0]
            start, stop = max(run.start, first) - first, min(run.stop, end) - first
            step = max(1, BLOCK_VALUES // math.prod(piece.shape[1:]))
            for at in range(start, stop, step):
                yield piece.rows(at, min(at + step, stop))


def _cast(rows: np.ndarray, dtype: np.dtype, rounded: np.dtype | None) -> np.ndarray:
    if rounded is not None:
        rows = rows.astype(rounded, copy=False)
    return rows.astype(dtype, copy=False)


def _plain(x: np.ndarray) -> np.ndarray:
    """bfloat16 seen as integers: numpy copies its own types faster than foreign ones."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x
