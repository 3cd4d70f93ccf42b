"""A tensor as it lies in a file: its description now, its values when somebody asks. Files are mapped, not read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from sgl_jax.models.model_errors import ModelError

_ROWS = 4096  # read at a time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """`rows(start, stop)` gives a slice of the first axis as floats, so that no tensor need be held whole.

    The slice may be a read-only view of the mapped file. A quantised tensor comes dequantised to float32; its `planes` are
    the tensors that its file holds, by name ("values", "scales"), each with as many rows as the tensor, as they are stored.
    """

    name: str  # the Hugging Face name, whatever the file calls it
    shape: tuple[int, ...]
    dtype: str  # as the file calls it: "BF16", "Q4_1"
    nbytes: int  # in the file
    rows: Callable[[int, int], np.ndarray]
    supported: bool = True  # False: `rows` gives the numbers of the file, which are no floats by themselves
    planes: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)  # of a quantised tensor, undequantised

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0])

    def changed(self, rows: Callable[[int, int], np.ndarray]) -> StoredTensor:
        """The tensor with other values, which its planes no longer say."""
        return dataclasses.replace(self, rows=rows, planes={})

    def rounded(self, dtype: DTypeLike) -> StoredTensor:
        """The tensor with every value rounded to the dtype. Its planes stay as they are stored."""
        kind = np.dtype(dtype)
        return dataclasses.replace(self, rows=lambda start, stop: self.rows(start, stop).astype(kind, copy=False))

    def take(self, order: np.ndarray) -> StoredTensor:
        """The tensor of some of its rows, in this order; so are its planes."""

        def rows(start: int, stop: int) -> np.ndarray:
            chosen = order[start:stop]
            first = int(chosen.min())
            return self.rows(first, int(chosen.max()) + 1)[chosen - first]

        nbytes = self.nbytes // self.shape[0] * len(order)
        planes = {name: plane.take(order) for name, plane in self.planes.items()}
        return dataclasses.replace(self, shape=(len(order), *self.shape[1:]), nbytes=nbytes, rows=rows, planes=planes)


def in_memory(name: str, array: np.ndarray) -> StoredTensor:
    """An array as if it were stored."""
    return StoredTensor(name, array.shape, array.dtype.name, array.nbytes, lambda start, stop: array[start:stop])


def with_unit_columns(matrix: StoredTensor) -> StoredTensor:
    """The matrix with each column divided by its length, in float32. The whole is read once for the lengths."""

    @functools.cache
    def lengths() -> np.ndarray:
        squares = np.zeros(matrix.shape[1], np.float32)
        for start in range(0, matrix.shape[0], _ROWS):
            squares += np.square(matrix.rows(start, min(start + _ROWS, matrix.shape[0])).astype(np.float32)).sum(0)
        return np.sqrt(squares) + np.float32(1e-7)

    return matrix.changed(lambda start, stop: matrix.rows(start, stop).astype(np.float32) / lengths())


def map_file(path: Path) -> np.ndarray:
    """The file's bytes as a read-only array backed by the page cache."""
    with open(path, "rb") as f:
        try:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise ModelError(f"{path} is empty; download it again") from e
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # read ahead far: tensors are read front to back
    return np.frombuffer(mapped, np.uint8)


def share_name(name: str, device: int) -> str:
    """Under which name device's share of a tensor is found, where the files hold shares."""
    return f"{name} (share {device})"


def joined(name: str, parts: Sequence[StoredTensor], axis: int) -> StoredTensor:
    """Matrices one below the other (axis 0) or side by side (axis 1) as one, and so their planes. Parts that do not fit
    together raise ModelError with their shapes."""
    if any(len(part.shape) != 2 for part in parts) or len({(part.shape[1 - axis], part.dtype) for part in parts}) != 1:
        shapes = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise ModelError(f"{name} lies in parts that do not fit together along axis {axis}: {shapes}")
    sizes = [part.shape[axis] for part in parts]
    ends = list(itertools.accumulate(sizes))
    shape = (ends[-1], parts[0].shape[1]) if axis == 0 else (parts[0].shape[0], ends[-1])

    def rows(start: int, stop: int) -> np.ndarray:
        if axis == 1:
            return np.concatenate([part.rows(start, stop) for part in parts], axis=1)
        inside = [(part, end - size, end) for part, size, end in zip(parts, sizes, ends, strict=True)]
        return np.concatenate(
            [
                part.rows(max(start - first, 0), min(stop, end) - first)
                for part, first, end in inside
                if first < stop and start < end
            ]
        )

    nbytes, supported = sum(part.nbytes for part in parts), all(part.supported for part in parts)
    planes = {
        plane: joined(f"{name} ({plane})", [part.planes[plane] for part in parts], axis) for plane in parts[0].planes
    }
    return StoredTensor(name, shape, parts[0].dtype, nbytes, rows, supported, planes)
