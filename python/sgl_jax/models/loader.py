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
from typing import Protocol

import jax
import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import FAMILIES, Families, tensor_names
from sgl_jax.models.quantised import Matrix
from sgl_jax.models.share import Share, as_slice, share_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.stored import StoredTensor, in_memory
from sgl_jax.models.weight_plan import Leaf, flat_weights, leaves_of, plan_weights
from sgl_jax.models.weights import Weights, declare
from sgl_jax.parallel.grid import LONE

Report = Callable[[float, int], None]  # fraction done, bytes of the checkpoint done


class Placer(Protocol):
    """Says which shares of each array are wanted here, and puts them in their place."""

    def shares(self, spec: WeightSpec) -> Sequence[Share]: ...

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> jax.Array:
        """The array from its shares, in their order; the arrays are the placer's from here on."""
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
    dtype: DTypeLike,
    *,
    families: Families = FAMILIES,
    rounded_to: DTypeLike | None = None,
    placer: Placer | None = None,
    report: Report | None = None,
) -> Weights[jax.Array]:
    """Raises one ModelError that lists every missing, surplus and misshapen tensor, before any of them is read.

    `rounded_to` rounds every value to that dtype before it is stored as `dtype`: float32 arithmetic on bfloat16 weights.
    """
    tensors = checkpoint.tensors
    if rounded_to is not None:
        tensors = {name: tensor.rounded(rounded_to) for name, tensor in tensors.items()}
    leaves = plan_weights(tensors, config, dtype, tensor_names(config, families), source=str(checkpoint.path))
    leaves.sort(key=lambda leaf: leaf.path.startswith(".layers"))  # the two big ones first, at the same time
    total = sum(leaf.nbytes for leaf in leaves)
    placed, done = {}, 0
    placer = placer or OneDevice()

    def assemble(leaf: Leaf) -> list[np.ndarray]:
        return [_assemble(leaf, share) for share in placer.shares(leaf.spec)]

    for leaf, arrays in _ahead(leaves, assemble):
        placed[leaf.path] = placer.place(leaf.spec, arrays)
        done += leaf.nbytes
        if report is not None:
            report(done / total, round(done / total * checkpoint.total_bytes))
    return _fill(declare(config, dtype), placed)


def random_weights(
    config: DecoderConfig,
    dtype: DTypeLike,
    seed: int = 0,
    *,
    placer: Placer | None = None,
    report: Report | None = None,
) -> Weights[jax.Array]:
    """Small random weights (--load-format dummy): norms are 1, the rest normal with deviation 0.02."""
    declared = declare(config, dtype)
    total = sum(spec.nbytes for spec in jax.tree.leaves(declared))

    # Drawing billions of normals takes minutes; reading a million over and over, from another start each time, does not.
    # The prime length keeps the rows of a matrix apart.
    normal = np.random.Generator(np.random.SFC64(seed)).standard_normal(_RANDOM_VALUES, np.float32)
    values = _plain((normal * np.float32(0.02)).astype(np.dtype(dtype)))
    placer = placer or OneDevice()

    def shares(weight: tuple[int, tuple[str, WeightSpec, Matrix[WeightSpec]]]) -> list[tuple[Leaf, list[np.ndarray]]]:
        """Draw a weight and divide its arrays."""
        index, (path, plain, spec) = weight
        whole = _draw(plain, path, values, np.random.Generator(np.random.SFC64([seed, index])))
        leaves = leaves_of(path, spec, [in_memory(path, whole)])
        if isinstance(spec, WeightSpec):
            return [(leaf, [share.of(whole) for share in placer.shares(leaf.spec)]) for leaf in leaves]
        return [(leaf, [_assemble(leaf, share) for share in placer.shares(leaf.spec)]) for leaf in leaves]

    placed, done = {}, 0
    for _, arrays_of_leaves in _ahead([*enumerate(flat_weights(config, dtype))], shares):
        for leaf, arrays in arrays_of_leaves:
            placed[leaf.path] = placer.place(leaf.spec, arrays)
            done += leaf.spec.nbytes
            if report is not None:
                report(done / total, done)
    return _fill(declared, placed)


def _draw(spec: WeightSpec, path: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A whole weight of random values, read round and round from somewhere."""
    out = aligned_empty(spec.shape, np.dtype(spec.dtype))
    if path.endswith("norm"):
        out[...] = 1
        return out
    flat, at = _plain(out).reshape(-1), int(rng.integers(values.size))
    filled = 0
    while filled < flat.size:
        count = min(values.size - at, flat.size - filled)
        flat[filled : filled + count] = values[at : at + count]
        filled, at = filled + count, (at + count) % values.size
    return out


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose buffer jax adopts on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(declared: Weights[WeightSpec], placed: dict[str, jax.Array]) -> Weights[jax.Array]:
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[jax.tree_util.keystr(path)], declared)


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


def _assemble(leaf: Leaf, share: Share) -> np.ndarray:
    """Put the share of an array together from its pieces, a block of rows at a time so that conversions stay in the cache."""
    shape = share.shape if leaf.spec.num_experts is not None else share.shape[1:]
    dtype = np.dtype(leaf.spec.dtype)
    out = aligned_empty(shape, dtype)
    lines = _plain(out).reshape(-1, *share.shape[2:])
    row = 0
    for block in _blocks(leaf, share):
        rows = block if share.columns is None else block[:, as_slice(share.columns)]
        lines[row : row + len(rows)] = _plain(rows.astype(dtype, copy=False))
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


def _plain(x: np.ndarray) -> np.ndarray:
    """View bfloat16 and narrower values as integers: numpy copies its own types faster than foreign ones."""
    return x.view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, x.dtype))
