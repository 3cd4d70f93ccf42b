"""AWQ's and GPTQ's matrices: codes of 4 or 8 bits in words, groups of inputs with a scale and a zero point each.

Both lie [in, out]. AWQ's words hold neighbouring outputs, interleaved; GPTQ's hold neighbouring inputs, and its first version
stores zero points less one. Sources: casper-hansen/AutoAWQ, awq/utils/packing_utils.py; AutoGPTQ, auto_gptq/nn_modules/qlinear;
ModelCloud/GPTQModel (checkpoint_format gptq_v2).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np

from sgl_jax.models.config_fields import checked_fields
from sgl_jax.models.formats.form import WITHIN, Form, named
from sgl_jax.models.formats.joined import DoesNotJoin, Parts, join_all, joined, part
from sgl_jax.models.formats.words import along_inputs, along_outputs, turned
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor

_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
_Group = Annotated[int, msgspec.Meta(ge=-1, le=2**16)]


class _Awq(msgspec.Struct):
    bits: Literal[4] = 4
    group_size: _Group = 128
    zero_point: bool = True
    version: Literal["gemm", "GEMM"] = "gemm"
    modules_to_not_convert: list[str] | None = None


class _Gptq(msgspec.Struct):
    bits: Literal[4, 8]
    group_size: _Group = 128
    desc_act: bool = False
    static_groups: bool = False  # groups are in order whatever desc_act says
    sym: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    dynamic: dict[str, object] | None = None
    modules_in_block_to_quantize: list[list[str]] | None = None


@dataclasses.dataclass(frozen=True)
class Integers:
    """Format of words [in, out]."""

    form: Form
    bits: int
    group: int | None
    is_awq: bool
    zeros_plus: int = 0  # added to stored zero points
    symmetric: bool = False
    left_out: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # the ends of the modules that are quantised; none: all are

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        parts = ("qzeros", "scales", "g_idx")
        return join_all(stored, self._join, main="qweight", dtypes=("I32",), parts=parts, to="weight")

    def skips(self, module: str) -> bool:
        return named(module, self.left_out) or bool(self.only and not named(module, self.only))

    def _join(self, base: str, words: StoredTensor, parts: Parts) -> StoredTensor:
        scales, zeros = part(base, parts, "scales"), part(base, parts, "qzeros")
        number = 32 // self.bits
        if not len(words.shape) == len(scales.shape) == len(zeros.shape) == 2:
            shapes = [list(each.shape) for each in (words, scales, zeros)]
            raise DoesNotJoin(f"qweight, scales and qzeros must be matrices, not {shapes}")
        order = _INTERLEAVED if self.is_awq else None
        zeros = along_outputs(turned(zeros), self.bits, number * zeros.shape[1], order)
        if self.zeros_plus:
            zeros = zeros.changed(lambda rows: rows.astype(np.float32) + self.zeros_plus)
        unpack = functools.partial(along_outputs, order=order) if self.is_awq else along_inputs
        codes = unpack(turned(words), self.bits, number * words.shape[1 if self.is_awq else 0])
        groups = parts["g_idx"].read() if "g_idx" in parts else None
        block, in_order = (1, self.group), self.form.kind == "groups"
        return joined(codes, turned(scales), block, zeros, groups=groups, in_order=in_order, symmetric=self.symmetric)


def awq(said: RawConfig) -> Integers:
    fields = checked_fields(said, _Awq, WITHIN)
    group = None if fields.group_size < 1 else fields.group_size
    form = Form("awq", f"4 bits in groups of {group}", "groups", "int4", group, offsets=fields.zero_point)
    left_out = ("lm_head", *(fields.modules_to_not_convert or ()))
    return Integers(form, 4, group, is_awq=True, symmetric=not fields.zero_point, left_out=left_out)


def gptq(said: RawConfig) -> Integers:
    """Read GPTQ's config. Raises ModelError for modules with settings of their own."""
    fields = checked_fields(said, _Gptq, WITHIN)
    dynamic = fields.dynamic or {}
    if others := [rule for rule in dynamic if not rule.startswith("-:")]:
        found = f"quantization_config.dynamic gives {others[0]!r} settings of its own"
        raise ModelError(f"config.json: {found}; all modules must have the same")
    group = None if fields.group_size < 1 else fields.group_size
    out_of_order = fields.desc_act and not fields.static_groups and group is not None
    about = f"{fields.bits} bits in groups of {group}{', out of order' if out_of_order else ''}"
    kind = "other" if out_of_order else "groups"
    form = Form("gptq", about, kind, f"int{fields.bits}", group, offsets=not fields.sym)
    return Integers(
        form,
        fields.bits,
        group,
        is_awq=False,
        zeros_plus=int(fields.checkpoint_format == "gptq"),
        symmetric=fields.sym,
        left_out=("lm_head", *(f"re:{rule[2:]}" for rule in dynamic)),
        only=tuple(module for each in fields.modules_in_block_to_quantize or [] for module in each),
    )
