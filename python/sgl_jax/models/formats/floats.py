"""Matrices of 8-bit and 4-bit floats beside scales: FP8 as DeepSeek, Qwen, AutoFP8 and FBGEMM write it, ModelOpt's FP8 and
NVFP4, and the MXFP4 of GPT-OSS.

Sources: transformers 5, quantizers/quantizer_finegrained_fp8.py; NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py;
openai/gpt-oss, gpt_oss/torch/weights.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np

from sgl_jax.models.config_fields import checked_fields
from sgl_jax.models.formats.form import WITHIN, Form, named
from sgl_jax.models.formats.joined import Block, DoesNotJoin, Parts, join_all, joined, number, part
from sgl_jax.models.formats.words import float_pairs
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor

_DTYPES = ("F8_E4M3", "U8")
_PARTS = ("_scale", "_scale_inv", "_scale_2", "_scales")
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class _Fp8(msgspec.Struct):
    weight_block_size: tuple[_Size, _Size] | None = None
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    fmt: Literal["e4m3", "float8_e4m3fn"] | None = None
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None


class _ModelOpt(msgspec.Struct):
    quant_algo: Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"] | None = None  # None: the KV cache alone
    group_size: Literal[16] | None = None
    exclude_modules: list[str] | None = None
    ignore: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Floats:
    """Format of float8 values, or of pairs of E2M1 in bytes, by the dtype that they are stored in."""

    form: Form
    block: Block | None = None  # None: each tensor, or each output, has a scale
    main: str = ""
    left_out: tuple[str, ...] = ()

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        return join_all(stored, self._join, main=self.main, dtypes=_DTYPES, parts=_PARTS)

    def skips(self, module: str) -> bool:
        return named(module, self.left_out)

    def _join(self, base: str, codes: StoredTensor, parts: Parts) -> StoredTensor:
        scales = part(base, parts, "_scale_inv", "_scale", "_scales")
        if codes.dtype == "U8":
            pairs = float_pairs(_flat(codes, scales))
            return joined(pairs, _scaled_again(scales, parts.get("_scale_2")), self.block or (1, 16))
        return joined(codes, scales, self.block or _by_shape(codes, scales))


def fp8(said: RawConfig) -> Floats:
    """Read `quant_method: fp8` and `fbgemm_fp8`."""
    fields = checked_fields(said, _Fp8, WITHIN)
    left_out = ("lm_head", *(fields.modules_to_not_convert or ()), *(fields.ignored_layers or ()))
    if fields.weight_block_size is None:
        return Floats(_fp8(said.get("quant_method", "fp8"), "a scale for each tensor or output"), left_out=left_out)
    height, width = fields.weight_block_size
    form = Form("fp8", f"blocks of {height} x {width}", "fp8 blocks", "float8_e4m3fn", width, rounding="float8_e4m3fn")
    return Floats(form, (height, width), left_out=left_out)


def modelopt(said: RawConfig) -> Floats:
    """Read NVIDIA ModelOpt's config: that in config.json, or the one of hf_quant_config.json."""
    fields = checked_fields(RawConfig(said.get("quantization") or said), _ModelOpt, WITHIN)
    left_out = tuple((fields.exclude_modules or []) + (fields.ignore or []))
    if fields.quant_algo == "NVFP4":
        return Floats(Form("modelopt", "NVFP4", "other"), (1, 16), left_out=left_out)
    if fields.quant_algo is None:
        return Floats(Form("modelopt", "scales of the KV cache alone", "other"), left_out=("*",))
    return Floats(_fp8("modelopt", fields.quant_algo), left_out=left_out)


def mxfp4(said: RawConfig) -> Floats:
    """Read GPT-OSS's: experts as bytes NAME_blocks [E, O, I / 32, 16] and exponents NAME_scales [E, O, I / 32]."""
    left_out = tuple(said.get("modules_to_not_convert") or [])
    return Floats(Form("mxfp4", "blocks of 1 x 32", "other"), (1, 32), main="_blocks", left_out=left_out)


def _fp8(method: str, about: str) -> Form:
    return Form(method, about, "fp8", "float8_e4m3fn", rounding="float8_e4m3fn")


def _by_shape(values: StoredTensor, scales: StoredTensor) -> Block:
    """Return the block of scales that are those of a whole tensor, or of each output."""
    return (None, None) if math.prod(scales.shape) == math.prod(values.shape[:-2]) else (1, None)


def _flat(codes: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Return bytes [*B, O, I / 2] without the axis of blocks that GPT-OSS has."""
    if len(codes.shape) < 4:
        return codes
    if codes.shape[:-1] != scales.shape:
        raise DoesNotJoin(f"{scales.name} is {list(scales.shape)}; it must be {list(codes.shape[:-1])}")
    shape = (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])
    return dataclasses.replace(codes.changed(lambda rows: rows.reshape(-1, *shape[1:])), shape=shape)


def _scaled_again(scales: StoredTensor, factor: StoredTensor | None) -> StoredTensor:
    if factor is None:
        return scales
    return scales.changed(lambda rows: rows.astype(np.float32) * number(factor))
