"""Numbers of a few bits, packed in words or bytes, as tensors that are read by rows. Words are little-endian."""

import dataclasses

import ml_dtypes
import numpy as np

from sgl_jax.models.stored import StoredTensor

# The E2M1 floats of a byte, that in the low half first. Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)  # [256, 2]
# numpy converts foreign floats four times slower than it looks them up.
FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
EXPONENTS = np.array([*(2.0 ** (i - 127) for i in range(255)), np.nan], np.float32)  # E8M0, section 5.4.1


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the u8 numbers, of 4 or 8 bits each, of words [..., n], from the lowest bits of each word up."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def along_inputs(words: StoredTensor, bits: int, inputs: int) -> StoredTensor:
    """Return i8[O, inputs], half the range below the codes in words [O, n], which hold neighbouring inputs."""

    def rows(start: int, stop: int) -> np.ndarray:
        return _centred(unpacked(words.rows(start, stop), bits)[:, :inputs], bits)

    return dataclasses.replace(words, shape=(words.shape[0], inputs), dtype=f"I{bits}", rows=rows)


def along_outputs(words: StoredTensor, bits: int, outputs: int, order: tuple[int, ...] | None = None) -> StoredTensor:
    """Return i8[outputs, I], half the range below the codes in words [n, I], which hold neighbouring outputs: in a word,
    output i is number order[i]."""
    number, inputs = 32 // bits, words.shape[1]

    def rows(start: int, stop: int) -> np.ndarray:
        first = start // number
        codes = unpacked(words.rows(first, -(-stop // number)), bits).reshape(-1, inputs, number)
        codes = codes if order is None else codes[..., order]
        lines = codes.swapaxes(1, 2).reshape(-1, inputs)
        return _centred(lines[start - first * number : stop - first * number], bits)

    return dataclasses.replace(words, shape=(outputs, inputs), dtype=f"I{bits}", rows=rows)


def float_pairs(octets: StoredTensor) -> StoredTensor:
    """Return the E2M1 floats [..., 2 n] of bytes [..., n]."""

    def rows(start: int, stop: int) -> np.ndarray:
        return _PAIRS[octets.rows(start, stop)].reshape(stop - start, *shape[1:])

    shape = (*octets.shape[:-1], 2 * octets.shape[-1])
    return dataclasses.replace(octets, shape=shape, dtype="E2M1", rows=rows)


def turned(matrix: StoredTensor) -> StoredTensor:
    """Return the matrix transposed. Rows are columns of the mapped file."""
    return dataclasses.replace(
        matrix, shape=matrix.shape[::-1], rows=lambda start, stop: matrix.read()[:, start:stop].T, planes={}
    )


def _centred(codes: np.ndarray, bits: int) -> np.ndarray:
    return (codes - np.uint8(1 << bits - 1)).view(np.int8)
