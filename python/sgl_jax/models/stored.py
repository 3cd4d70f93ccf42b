"""A tensor as it lies in a file: its description now, its values when somebody asks. Files are mapped, not read."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sgl_jax.models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """`rows(start, stop)` gives a slice of the first axis as floats, so that no tensor need be held whole.

    The slice may be a read-only view of the mapped file. A quantised tensor comes dequantised to float32.
    """

    name: str  # the Hugging Face name, whatever the file calls it
    shape: tuple[int, ...]
    dtype: str  # as the file calls it: "BF16", "Q4_1"
    nbytes: int  # in the file
    rows: Callable[[int, int], np.ndarray]
    supported: bool = True  # False: a type that `rows` cannot read

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0])

    def take(self, order: np.ndarray) -> StoredTensor:
        """A tensor of these of its rows, in this order."""

        def rows(start: int, stop: int) -> np.ndarray:
            chosen = order[start:stop]
            first = int(chosen.min())
            return self.rows(first, int(chosen.max()) + 1)[chosen - first]

        nbytes = self.nbytes // self.shape[0] * len(order)
        return dataclasses.replace(self, shape=(len(order), *self.shape[1:]), nbytes=nbytes, rows=rows)


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
