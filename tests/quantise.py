"""Writers of quantised matrices, each in a format's layout, from the same codes; the readers are in models/formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SAFETENSORS = {
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
} | {
    "float16": "F16",
    "float32": "F32",
    "uint16": "U16",
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Coded(NamedTuple):
    """Matrix of w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g], where g = groups[i]."""

    codes: np.ndarray  # [O, I], from 0 up
    zeros: np.ndarray  # [O, G]
    scales: np.ndarray  # [O, G] float16
    groups: np.ndarray  # [I]
    bits: int

    @property
    def floats(self) -> np.ndarray:
        """The matrix, float32."""
        wide = self.codes.astype(np.float32) - self.zeros[:, self.groups]
        return wide * self.scales[:, self.groups].astype(np.float32)


def coded(
    outputs: int, inputs: int, group: int, bits: int = 4, *, symmetric: bool = False, in_order: bool = True
) -> Coded:
    """Return a random matrix."""
    rng = np.random.default_rng([outputs, inputs, group, bits])
    codes = rng.integers(0, 2**bits, (outputs, inputs))
    groups = np.arange(inputs) // group
    zeros = (
        np.full((outputs, inputs // group), 2 ** (bits - 1))
        if symmetric
        else rng.integers(1, 2**bits, (outputs, inputs // group))
    )
    scales = (0.01 + 0.1 * rng.random(zeros.shape)).astype(np.float16)
    return Coded(codes, zeros, scales, groups if in_order else rng.permutation(groups), bits)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack numbers [..., n] into int32 words [..., n * bits / 32], from the lowest bits of each up."""
    number = 32 // bits
    lines = codes.reshape(*codes.shape[:-1], -1, number).astype(np.uint64)
    return (lines << (np.arange(number, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32).view(np.int32)


def awq(m: Coded) -> dict[str, np.ndarray]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # outputs in a word

    def words(lines: np.ndarray) -> np.ndarray:
        return packed(lines.reshape(len(lines), -1, 8)[..., order].reshape(len(lines), -1), 4)

    return {"qweight": words(m.codes.T), "qzeros": words(m.zeros.T), "scales": np.ascontiguousarray(m.scales.T)}


def gptq(m: Coded, less: int = 1) -> dict[str, np.ndarray]:
    return {
        "qweight": np.ascontiguousarray(packed(m.codes, m.bits).T),
        "qzeros": packed(m.zeros.T - less, m.bits),
        "scales": np.ascontiguousarray(m.scales.T),
        "g_idx": m.groups.astype(np.int32),
    }


def gptq_v2(m: Coded) -> dict[str, np.ndarray]:
    return gptq(m, 0)


def pack_quantized(m: Coded) -> dict[str, np.ndarray]:
    half, in_order = 2 ** (m.bits - 1), (np.diff(m.groups) >= 0).all()
    tensors = {
        "weight_packed": packed(m.codes, m.bits),
        "weight_scale": m.scales,
        "weight_shape": np.array(m.codes.shape),
    }
    if (m.zeros != half).any():
        tensors["weight_zero_point"] = np.ascontiguousarray(packed(m.zeros.T, m.bits).T)
    return tensors if in_order else tensors | {"weight_g_idx": m.groups.astype(np.int32)}


def settings(method: str, m: Coded) -> dict[str, Any]:
    """Return the quantization_config of a matrix in the format of a writer's name."""
    group, symmetric = int((m.groups == 0).sum()), bool((m.zeros == 2 ** (m.bits - 1)).all())
    if method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    out_of_order = bool((np.diff(m.groups) < 0).any())
    if method.startswith("gptq"):
        said = {"bits": m.bits, "group_size": group, "desc_act": out_of_order, "sym": symmetric}
        return said | {"quant_method": "gptq", "checkpoint_format": method}
    weights = {"num_bits": m.bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return compressed(weights | {"actorder": "group" if out_of_order else None}, "pack-quantized")


def compressed(weights: Mapping[str, Any], layout: str, **more: Any) -> dict[str, Any]:
    """Return the quantization_config of compressed-tensors with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights)} | more}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


WRITERS: dict[str, Callable[[Coded], dict[str, np.ndarray]]] = {
    "awq": awq,
    "gptq": gptq,
    "gptq_v2": gptq_v2,
    "pack-quantized": pack_quantized,
}


def fp8(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float8_e4m3fn)


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file. The package that does has no names for ml_dtypes' floats."""
    header, blobs, at = {}, [], 0
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        span = [at, at + len(blob)]
        header[name] = {"dtype": SAFETENSORS[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
