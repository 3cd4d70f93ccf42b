"""Matrices as vLLM's compressed-tensors and llm-compressor write them: 8-bit numbers in `weight`, others in `weight_packed`.

Source: vllm-project/compressed-tensors (quantization/quant_args.py, quant_config.py; compressors/quantized_compressors).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np

from sgl_jax.models.config_fields import checked_fields
from sgl_jax.models.formats.form import WITHIN, Form, named
from sgl_jax.models.formats.joined import Block, DoesNotJoin, Parts, join_all, joined, number, part
from sgl_jax.models.formats.words import along_inputs, along_outputs, float_pairs
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor

_NAME = "compressed-tensors"
_PARTS = ("_scale", "_zero_point", "_g_idx", "_shape", "_global_scale")
_EIGHT_BITS = Literal["int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"]
_PACKED = Literal["pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"]
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**16)]


class _Weights(msgspec.Struct, frozen=True):
    num_bits: Literal[4, 8] = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: Annotated[int, msgspec.Meta(ge=-1, le=2**16)] | None = None
    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"] | None = None
    block_structure: tuple[_Size, _Size] | None = None
    actorder: str | bool | None = None

    @property
    def block(self) -> Block:
        """Outputs and inputs that share a scale."""
        by_group = "group" if self.group_size and self.group_size > 0 else "channel" if self.group_size else "tensor"
        whole: dict[str, Block] = {"tensor": (None, None), "channel": (1, None)}
        of_block = (self.block_structure or (128, 128)) if self.strategy == "block" else (1, self.group_size)
        return whole.get(self.strategy or by_group, of_block)

    @property
    def in_order(self) -> bool:
        """Inputs of a group are neighbours."""
        return self.actorder not in ("group", "dynamic", True)


class _Activations(msgspec.Struct, frozen=True):
    num_bits: int = 8
    type: Literal["int", "float"] = "int"


class _Group(msgspec.Struct, frozen=True):
    targets: tuple[str, ...]
    weights: _Weights | None = None
    input_activations: _Activations | None = None


class _Config(msgspec.Struct):
    config_groups: dict[str, _Group] = {}
    format: Literal[_EIGHT_BITS, _PACKED, "mixed-precision", "dense"] = "dense"
    ignore: list[str] | None = None
    sparsity_config: dict[str, object] | None = None
    transform_config: dict[str, object] | None = None


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """Format whose config gives groups of modules their own settings."""

    form: Form
    groups: tuple[_Group, ...]
    left_out: tuple[str, ...]

    def view(self, stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        packed = join_all(stored, self._packed, main="_packed", dtypes=("I32", "U8"), parts=_PARTS)
        return join_all(packed, self._plain, main="", dtypes=("I8", "F8_E4M3"), parts=_PARTS)

    def skips(self, module: str) -> bool:
        return named(module, self.left_out) or self._weights(module) is None

    def _weights(self, module: str) -> _Weights | None:
        """Return the settings of a module: of a group that names it, else of one that names a class, such as Linear."""
        by_name = (group for group in self.groups if named(module, group.targets))
        by_class = (group for group in self.groups if any(target[:1].isupper() for target in group.targets))
        return next((group.weights for group in (*by_name, *by_class) if group.weights), None)

    def _settings(self, base: str, type_: str, bits: int | None = None) -> _Weights:
        found = self._weights(base.removesuffix(".weight"))
        if found is None:
            raise DoesNotJoin("no config_groups of quantization_config name it")
        if found.type != type_ or bits not in (found.num_bits, None):
            raise DoesNotJoin(f"quantization_config says {found.type} of {found.num_bits} bits")
        return found

    def _plain(self, base: str, codes: StoredTensor, parts: Parts) -> StoredTensor:
        said = self._settings(base, "int" if codes.dtype == "I8" else "float", 8)
        zeros = None if said.symmetric else part(base, parts, "_zero_point")
        scales, groups = part(base, parts, "_scale"), _groups(parts)
        return joined(codes, scales, said.block, zeros, groups=groups, in_order=said.in_order)

    def _packed(self, base: str, words: StoredTensor, parts: Parts) -> StoredTensor:
        scales = part(base, parts, "_scale")
        if words.dtype == "U8":
            said = self._settings(base, "float", 4)
            if said.strategy == "tensor_group":
                divisor = part(base, parts, "_global_scale")
                scales = scales.changed(lambda rows: rows.astype(np.float32) / number(divisor))
            return joined(float_pairs(words), scales, said.block)
        said = self._settings(base, "int")
        per_word, (outputs, inputs) = 32 // said.num_bits, map(int, part(base, parts, "_shape").read())
        if words.shape != (outputs, -(-inputs // per_word)):
            needed = f"{[outputs, -(-inputs // per_word)]} for weight_shape {[outputs, inputs]} in {said.num_bits} bits"
            raise DoesNotJoin(f"words are {list(words.shape)}, not {needed}")
        zeros = None if said.symmetric else part(base, parts, "_zero_point")
        if zeros is not None:
            lines = zeros.shape[0]
            fits = lines == -(-outputs // per_word)
            zeros = along_outputs(zeros, said.num_bits, outputs if fits else lines * per_word)
        codes = along_inputs(words, said.num_bits, inputs)
        return joined(codes, scales, said.block, zeros, groups=_groups(parts), in_order=said.in_order)


def _groups(parts: Parts) -> np.ndarray | None:
    """Return the group of each input where they are not in order, which -1 stands for."""
    groups = parts["_g_idx"].read() if "_g_idx" in parts else None
    return None if groups is None or (groups == -1).all() else groups


def compressed_tensors(said: RawConfig) -> CompressedTensors:
    """Read the config. Raises ModelError for sparse weights, and for weights that were rotated."""
    fields = checked_fields(said, _Config, WITHIN)
    sparse = (fields.sparsity_config or {}).get("format") or "dense"
    if sparse != "dense" or fields.transform_config:
        found = "transform_config" if fields.transform_config else f"sparsity_config.format {sparse!r}"
        raise ModelError(f"config.json: quantization_config has {found}; dense weights without transforms are served")
    groups = tuple(fields.config_groups.values())
    forms = {_form(group, fields.format) for group in groups if group.weights}
    form = forms.pop() if len(forms) == 1 else Form(_NAME, f"{fields.format} of several kinds", "other")
    return CompressedTensors(form, groups, tuple(fields.ignore or ()))


def _form(group: _Group, layout: str) -> Form:
    weights = group.weights or _Weights()
    (height, width), bits = weights.block, weights.num_bits
    shared = f"{height or 'all'} x {width or 'all'}"
    about = f"{layout}, {weights.type} of {bits} bits, blocks of {shared}"
    rounds = group.input_activations is not None and group.input_activations.num_bits == 8
    if weights.type == "float":
        kind = "other" if bits == 4 or (height == 1 and width) else "fp8 blocks" if width else "fp8"
        return Form(_NAME, about, kind, "float8_e4m3fn", width, rounding="float8_e4m3fn" if rounds else None)
    if not weights.in_order:
        return Form(_NAME, f"{about}, out of order", "other")
    if width or bits == 4:
        return Form(_NAME, about, "groups", f"int{bits}", width, offsets=not weights.symmetric)
    if not weights.symmetric:
        return Form(_NAME, about, "other")
    return Form(_NAME, about, "w8a8", rounding="int8") if rounds else Form(_NAME, about, "int8")
