"""Reads a .safetensors file: the file is mapped and each tensor is a view, so that nothing is copied.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header with each tensor's dtype,
shape and [begin, end) in the data, then the data. The safetensors package has no numpy view of bfloat16 and copies
every tensor, hence this reader.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.stored import StoredTensor, map_file

DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Values of quantised tensors are read as they are stored. They mean nothing without a format.
_BYTES = {"I8": np.dtype("i1"), "U8": np.dtype("u1"), "F8_E8M0": np.dtype("u1")}  # F8_E8M0: exponents alone
QUANTISED = {**_BYTES, "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
TABLES = {"I64": np.dtype("i8"), "I32": np.dtype("i4"), "BOOL": np.dtype("?")}  # tables of ids, and packed codes
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Entry(msgspec.Struct):
    """A tensor in the header."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def read_safetensors(path: Path, data: np.ndarray | None = None) -> dict[str, StoredTensor]:
    """Describe the tensors of a file, or of its bytes, u8[size]. Raises ModelError for a damaged one."""
    data = map_file(path) if data is None else data
    header_bytes = int(data[:8].view("<u8")[0]) if data.size >= 8 else MAX_HEADER_BYTES + 1
    if header_bytes > min(MAX_HEADER_BYTES, data.size - 8):
        raise ModelError(
            f"{path} is not a whole safetensors file: its header claims {header_bytes} bytes, the file has {data.size}; "
            "download it again"
        )
    with faults_named(path, "its header is damaged; download it again"):
        header = msgspec.json.decode(data[8 : 8 + header_bytes].tobytes(), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
    entries = {}
    for name, raw in header.items():
        with faults_named(path, f"its header is damaged at {name}; download it again"):
            entries[name] = msgspec.json.decode(raw, type=_Entry)
    body = data[8 + header_bytes :]
    whole = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if whole > body.size:
        raise ModelError(
            f"{path} is cut short: its tensors need {8 + header_bytes + whole} bytes, the file has {data.size}; "
            "download it again"
        )
    return {name: _stored(path, name, entry, body) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: _Entry, body: np.ndarray) -> StoredTensor:
    shape, (begin, end) = entry.shape, entry.data_offsets
    dtype: np.dtype[Any] | None = (DTYPES | QUANTISED | TABLES).get(entry.dtype)
    if begin > end or (dtype is not None and math.prod(shape) * dtype.itemsize != end - begin):
        raise ModelError(
            f"{path}: {name} has shape {list(shape)} of {entry.dtype} but lies at bytes {begin}..{end}; download it again"
        )

    def rows(start: int, stop: int) -> np.ndarray:
        return body[begin:end].view(dtype or np.uint8).reshape(shape or 1)[start:stop]

    return StoredTensor(name, shape, entry.dtype, end - begin, rows, supported=entry.dtype in DTYPES)
