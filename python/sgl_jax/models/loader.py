"""Fills the declared weights: from a checkpoint, tensor by tensor, or with random numbers.

Each weight is put together in one host buffer of the target dtype, handed to `place` and forgotten, so beside the
placed weights only the few being worked on are in memory. Threads do the copying (numpy releases the GIL); `place` and
`report` are called from the caller's thread, in an order that depends on the model alone. If a weight is divided over
devices, only the shards of this process's devices are read.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, cast

import jax
import ml_dtypes  # noqa: F401  (numpy then knows "bfloat16")
import numpy as np
from jax.typing import DTypeLike

from sgl_jax.models.checkpoint import Checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.draft_checkpoint import draft_names
from sgl_jax.models.families import FAMILIES, Families, tensor_names
from sgl_jax.models.plan import Leaf, flat_weights, leaves_of, plan_weights
from sgl_jax.models.shard import Shard, as_slice, shard_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.stored import StoredTensor, rows_below
from sgl_jax.models.weights import Weights, declare
from sgl_jax.parallel.grid import LONE

Report = Callable[[float, int], None]  # (fraction that is loaded, bytes that are loaded)


class Placer[Placed](Protocol):
    """Chooses the shards of each array that this process needs, and puts them on their devices."""

    def shards(self, spec: WeightSpec) -> Sequence[Shard]: ...

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> Placed:
        """Make the array from its shards, in the order of `shards`. It may keep the buffers of `arrays`."""
        ...


class OneDevice:
    """Places whole weights on the default device."""

    def shards(self, spec: WeightSpec) -> Sequence[Shard]:
        return [shard_of(spec, LONE, 0)]

    def place(self, spec: WeightSpec, arrays: Sequence[np.ndarray]) -> jax.Array:
        (array,) = arrays
        return jax.device_put(array)


_RANDOM_VALUES = 1_048_573  # a prime number
_ALIGNMENT = 64  # jax on a CPU adopts a buffer so aligned instead of copying it


def load_weights[Placed](
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: DTypeLike,
    *,
    draft: Checkpoint | None = None,
    families: Families = FAMILIES,
    rounded_to: DTypeLike | None = None,
    placer: Placer[Placed] | None = None,
    report: Report | None = None,
) -> Weights[Placed]:
    """Read a checkpoint's weights, and those of the draft model from `draft` or, where that is an MTP layer, from the
    same checkpoint. `families` are those that `config` was made with.

    `rounded_to` rounds every value to that dtype before it is stored as `dtype`: float32 arithmetic on bfloat16
    weights. Raises one ModelError that lists every missing, surplus and misshapen tensor, before any of them is read.
    """
    tensors = checkpoint.tensors
    if rounded_to is not None:
        tensors = {name: tensor.rounded(rounded_to) for name, tensor in tensors.items()}
    leaves = plan_weights(tensors, config, tensor_names(config, families), dtype, source=str(checkpoint.path))
    num_bytes = checkpoint.total_bytes + (draft.total_bytes if draft else 0)
    if config.draft is not None:
        names, stored = draft_names(config, families), draft.tensors if draft else tensors
        source = str(draft.path) if draft else f"The MTP layer of {checkpoint.path}"
        leaves += plan_weights(stored, config, names, dtype, source=source, of_draft=True)
    return _placed(declare(config, dtype), leaves, num_bytes, placer, report)


def random_weights[Placed](
    config: DecoderConfig,
    dtype: DTypeLike,
    seed: int = 0,
    *,
    placer: Placer[Placed] | None = None,
    report: Report | None = None,
) -> Weights[Placed]:
    """Make small random weights (--load-format dummy): norms are 1, offsets of draft ids 0, the rest normal with
    deviation 0.02."""
    # Drawing billions of normals takes minutes; reading a million over and over, from another start in each weight, does
    # not. Their number is prime, so that the rows of a matrix differ.
    normal = np.random.Generator(np.random.SFC64(seed)).standard_normal(_RANDOM_VALUES, np.float32)
    values = np.tile((normal * np.float32(0.02)).astype(np.dtype(dtype)), 2)
    leaves = []
    for index, (path, plain, spec) in enumerate(flat_weights(config, dtype)):
        start = int(np.random.Generator(np.random.SFC64([seed, index])).integers(_RANDOM_VALUES))
        leaves += leaves_of(path, spec, [_random(path, plain, values, start)])
    declared = declare(config, dtype)
    return _placed(declared, leaves, sum(spec.nbytes for spec in jax.tree.leaves(declared)), placer, report)


def _random(path: str, spec: WeightSpec, values: np.ndarray, offset: int) -> StoredTensor:
    """Describe a weight of the random values from `offset` on, over and over. `values` holds them twice."""
    width = math.prod(spec.shape[1:])

    def rows(start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *spec.shape[1:])
        if "norm" in path.rpartition(".")[2] or path.endswith("].kv_scales"):
            return np.ones(shape, values.dtype)
        if spec.dtype == "int32":
            return np.zeros(shape, spec.dtype)
        first = (offset + start * width) % _RANDOM_VALUES
        return np.resize(values[first : first + _RANDOM_VALUES], shape)

    return StoredTensor(path, spec.shape, spec.dtype, spec.nbytes, rows)


def _placed[Placed](
    declared: Weights[WeightSpec],
    leaves: list[Leaf],
    num_bytes: int,
    placer: Placer[Placed] | None,
    report: Report | None,
) -> Weights[Placed]:
    """Assemble and place each leaf. `num_bytes` is reported when all are placed."""
    leaves.sort(key=lambda leaf: leaf.path.startswith(".layers"))  # embedding and head, the biggest, come first
    total, done = sum(leaf.nbytes for leaf in leaves), 0
    placed, to = {}, placer or cast(Placer[Placed], OneDevice())

    def assemble(leaf: Leaf) -> list[np.ndarray]:
        return [_assemble(leaf, shard) for shard in to.shards(leaf.spec)]

    for leaf, arrays in _ahead(leaves, assemble):
        placed[leaf.path] = to.place(leaf.spec, arrays)
        done += leaf.nbytes
        if report is not None:
            report(done / total, round(done / total * num_bytes))
    return jax.tree_util.tree_map_with_path(lambda path, _: placed[jax.tree_util.keystr(path)], declared)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array whose buffer jax adopts on a CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _ahead[T, R](items: list[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each item and its result, in order. Threads work on a few items ahead."""
    workers, left = min(16, os.cpu_count() or 1), iter(items)
    running: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        try:
            while True:
                for item in itertools.islice(left, workers + 1 - len(running)):
                    running.append((item, pool.submit(work, item)))
                if not running:
                    return
                first, future = running.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _assemble(leaf: Leaf, shard: Shard) -> np.ndarray:
    """Put a shard of an array together from its pieces, in blocks of rows so that conversions stay in the cache."""
    shape = shard.shape if leaf.spec.num_experts is not None else shard.shape[1:]
    dtype = np.dtype(leaf.spec.dtype)
    out = aligned_empty(shape, dtype)
    lines = _plain(out).reshape(-1, *shard.shape[2:])
    row = 0
    for block in _blocks(leaf, shard):
        rows = block if shard.columns is None else block[:, as_slice(shard.columns)]
        lines[row : row + len(rows)] = _plain(rows.astype(dtype, copy=False))
        row += len(rows)
    return out


def _blocks(leaf: Leaf, shard: Shard) -> Iterator[np.ndarray]:
    """Yield the shard's rows in order, in blocks with all columns."""
    per_expert = len(leaf.pieces) // (leaf.spec.num_experts or 1)
    fused = leaf.spec.num_experts is not None and len(leaf.pieces[0].shape) == len(leaf.spec.shape)
    for expert in shard.experts:
        if fused:  # one tensor has the matrices of all experts
            (piece,) = leaf.pieces
            (matrix,) = piece.rows(expert, expert + 1)
            yield from (matrix[as_slice(run)] for run in shard.rows)
        else:
            pieces = leaf.pieces[expert * per_expert : (expert + 1) * per_expert]
            yield from itertools.chain.from_iterable(rows_below(pieces, run) for run in shard.rows)


def _plain(x: np.ndarray) -> np.ndarray:
    """View bfloat16 and narrower values as integers: numpy copies its own types faster than foreign ones."""
    return x.view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, x.dtype))
