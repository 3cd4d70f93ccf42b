"""Tensors as they lie in files: their descriptions now, their values when somebody asks. Files are mapped, not read."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from sgl_jax.models.folder_files import reading
from sgl_jax.models.model_errors import ModelError

_BLOCK_VALUES = 1 << 16  # converted at a time, so that they stay in a core's cache
_ROWS = 4096  # summed at a time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Description of a tensor. `rows(start, stop)` reads a slice of its first axis as floats, so that none is held
    whole. A scalar has one row.

    The slice may be a read-only view of the mapped file. A quantised tensor is read dequantised to float32. Its
    `planes` are the tensors that the file holds for it ("values", "scales", "offsets"), as they are stored, each with as many rows
    as the tensor.
    """

    name: str  # the Hugging Face name, whatever the file calls it
    shape: tuple[int, ...]
    dtype: str  # the file's name for it: "BF16", "Q4_1"
    nbytes: int  # size in the file
    rows: Callable[[int, int], np.ndarray]
    supported: bool = True  # False: `rows` gives the numbers of the file, which are no floats by themselves
    planes: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)  # parts of a quantised tensor, by name

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0] if self.shape else 1)

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
        """Return the tensor with a function applied to each slice of rows, and without its planes."""
        return dataclasses.replace(self, rows=lambda start, stop: change(self.rows(start, stop)), planes={})

    def rounded(self, dtype: DTypeLike) -> StoredTensor:
        """Return the tensor with every value rounded to the dtype. Its planes stay as they are stored."""
        kind = np.dtype(dtype)
        return dataclasses.replace(self, rows=lambda start, stop: self.rows(start, stop).astype(kind, copy=False))

    def take(self, order: np.ndarray) -> StoredTensor:
        """Return the tensor of some of its rows, in this order, with planes of the same rows."""

        def rows(start: int, stop: int) -> np.ndarray:
            chosen = order[start:stop]
            first = int(chosen.min())
            return self.rows(first, int(chosen.max()) + 1)[chosen - first]

        nbytes = self.nbytes // self.shape[0] * len(order)
        planes = {name: plane.take(order) for name, plane in self.planes.items()}
        return dataclasses.replace(self, shape=(len(order), *self.shape[1:]), nbytes=nbytes, rows=rows, planes=planes)


def with_unit_columns(matrix: StoredTensor) -> StoredTensor:
    """Return the matrix with each column divided by its length, in float32. The whole is read once for the lengths."""

    @functools.cache
    def lengths() -> np.ndarray:
        squares = np.zeros(matrix.shape[1], np.float32)
        for start in range(0, matrix.shape[0], _ROWS):
            squares += np.square(matrix.rows(start, min(start + _ROWS, matrix.shape[0])).astype(np.float32)).sum(0)
        return np.sqrt(squares) + np.float32(1e-7)

    return matrix.changed(lambda rows: rows.astype(np.float32) / lengths())


def map_file(path: Path) -> np.ndarray:
    """Map a file's bytes as a read-only u8[size], backed by the page cache. Raises ModelError for a file that is none."""
    with reading(path), path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # read ahead far: tensors are read front to back
    return np.frombuffer(mapped, np.uint8)


def shard_name(name: str, device: int) -> str:
    """Return the key of shard `device` of a tensor in a checkpoint that each device saved for itself."""
    return f"{name} (shard {device})"


def rows_below(parts: Sequence[StoredTensor], run: range) -> Iterator[np.ndarray]:
    """Yield a run of the rows of tensors that lie one below the other, in blocks of about _BLOCK_VALUES values."""
    first = 0
    for part in parts:
        stop = min(run.stop - first, part.shape[0])
        step = max(1, _BLOCK_VALUES // math.prod(part.shape[1:]))
        for at in range(max(run.start - first, 0), stop, step):
            yield part.rows(at, min(at + step, stop))
        first += part.shape[0]


def concatenated(name: str, parts: Sequence[StoredTensor], axis: int) -> StoredTensor:
    """Return matrices one below the other (axis 0) or side by side (axis 1) as one, and their planes alike.

    Raises ModelError with the shapes of parts that do not fit together.
    """
    if any(len(part.shape) != 2 for part in parts) or len({(part.shape[1 - axis], part.dtype) for part in parts}) != 1:
        shapes = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise ModelError(f"{name} lies in parts that do not fit together along axis {axis}: {shapes}")

    def rows(start: int, stop: int) -> np.ndarray:
        if axis == 1:
            return np.concatenate([part.rows(start, stop) for part in parts], axis=1)
        return np.concatenate([*rows_below(parts, range(start, stop))])

    first, length = parts[0], sum(part.shape[axis] for part in parts)
    shape = (length, first.shape[1]) if axis == 0 else (first.shape[0], length)
    nbytes, supported = sum(part.nbytes for part in parts), all(part.supported for part in parts)
    planes = {key: concatenated(f"{name} ({key})", [part.planes[key] for part in parts], axis) for key in first.planes}
    return StoredTensor(name, shape, first.dtype, nbytes, rows, supported, planes)
