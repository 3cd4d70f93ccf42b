"""MXFP4 as checkpoints store it: blocks of 32 four-bit floats, two in a byte, and an exponent for each block.

Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0). The first value of a
pair lies in the low half of its byte (github.com/openai/gpt-oss, gpt_oss/torch/weights.py).
"""

import numpy as np

from sgl_jax.models.stored import StoredTensor

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)  # [256, 2], by byte: low half, high half
_SCALES = np.array([*(2.0 ** (i - 127) for i in range(255)), np.nan], np.float32)  # [256]


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Turn u8[…, I / 32, 16] and u8[…, I / 32] into f32[…, I]. Exact: a value times a power of two."""
    values = _PAIRS[blocks].reshape(*blocks.shape[:-1], BLOCK) * _SCALES[scales][..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def stored_mxfp4(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Return the floats of u8[R, …, I / 32, 16] and u8[R, …, I / 32] as one tensor [R, …, I] with two planes."""

    def rows(start: int, stop: int) -> np.ndarray:
        return dequantize(blocks.rows(start, stop), scales.rows(start, stop))

    fits = len(blocks.shape) > 2 and blocks.shape[-1] * 2 == BLOCK and blocks.shape[:-1] == scales.shape
    shape = (*blocks.shape[:-2], blocks.shape[-2] * BLOCK) if fits else blocks.shape
    dtype = "MXFP4" if fits else f"MXFP4 of blocks {list(blocks.shape)} and scales {list(scales.shape)}"
    supported, planes = fits and blocks.dtype == scales.dtype == "U8", {"values": blocks, "scales": scales}
    return StoredTensor(name, shape, dtype, blocks.nbytes + scales.nbytes, rows, supported, planes)
