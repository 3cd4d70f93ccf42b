"""Reads a GGUF file's metadata and tensor descriptions (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The gguf package's own reader makes an array for each of a vocabulary's hundred thousand strings and takes seconds;
this one takes milliseconds. The package still knows the quantised formats (models/gguf.py).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.stored import map_file

VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_SCALAR_DTYPES = {code: np.dtype(spec) for code, spec in _SCALARS.items()}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # outermost first, as numpy has it
    type: int  # ggml's number for the storage format
    offset: int  # in the file


@dataclasses.dataclass(frozen=True)
class GgufFile:
    path: Path
    data: np.ndarray  # u8[file size], mapped
    metadata: Mapping[str, object]
    tensors: dict[str, GgufTensor]

    def get[T](self, key: str, kind: type[T]) -> T | None:
        """Return the value of a key, None where there is none. Raises ModelError for a value of another kind."""
        value = self.metadata.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise ModelError(f"{self.path} has {key} {value!r}; it must be of type {kind.__name__}")


def read_gguf(path: str | Path) -> GgufFile:
    """Read the metadata and the descriptions of the tensors. Raises ModelError for a damaged or split file."""
    path = Path(path)
    data = map_file(path)
    if data[:4].tobytes() != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it begins with {data[:4].tobytes()!r}; download it again")
    cursor = _Cursor(data, 4)
    with faults_named(path, "cut short or damaged; download it again"):
        version = cursor.integer("<I")
        if version not in VERSIONS:
            raise ModelError(f"{path} is GGUF version {version}; supported are {VERSIONS}, little-endian")
        num_tensors, num_pairs = cursor.integer("<Q"), cursor.integer("<Q")
        metadata: dict[str, Any] = {cursor.string(): cursor.value(cursor.integer("<I")) for _ in range(num_pairs)}
        described = [_tensor(cursor) for _ in range(num_tensors)]
    file = GgufFile(path, data, metadata, {})
    if (parts := file.get("split.count", int) or 1) > 1:
        raise ModelError(f"{path} is part of a GGUF split in {parts}; join the parts first: llama-gguf-split --merge")
    alignment = file.get("general.alignment", int)
    if alignment is not None and alignment < 1:
        raise ModelError(f"{path} has general.alignment {alignment}; it must be at least 1")
    start = -(-cursor.at // (alignment or 32)) * (alignment or 32)
    tensors = {t.name: dataclasses.replace(t, offset=start + t.offset) for t in described}
    return dataclasses.replace(file, tensors=tensors)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string()
    dims = [cursor.integer("<Q") for _ in range(cursor.integer("<I"))]
    return GgufTensor(name, tuple(reversed(dims)), cursor.integer("<I"), cursor.integer("<Q"))


class _Cursor:
    """A walk over the header. `at` is the index of the next unread byte."""

    def __init__(self, data: np.ndarray, at: int):
        self._bytes = memoryview(data)
        self.at = at

    def integer(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._bytes, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        return self._take(self.integer("<Q")).decode()

    def _strings(self, count: int) -> list[str]:
        """Read a vocabulary's hundred thousand strings, without a call for each."""
        found, data, at, length_at = [], self._bytes, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > len(data):
                raise IndexError(f"a string ends at byte {at} of {len(data)}")
            found.append(str(data[start:at], "utf-8"))
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.integer("<I"), self.integer("<Q")
            if item == _ARRAY:
                raise ValueError(f"an array of arrays at byte {self.at}")
            return self._strings(count) if item == _STRING else self._scalars(item, count)
        return self._scalars(kind, 1)[0]

    def _scalars(self, kind: int, count: int) -> list:
        dtype = _SCALAR_DTYPES[kind]
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _take(self, size: int) -> bytes:
        if self.at + size > len(self._bytes):
            raise IndexError(f"{size} bytes wanted, {len(self._bytes) - self.at} left")
        self.at += size
        return self._bytes[self.at - size : self.at].tobytes()
