"""Matrices of int8, float8 or int4 values with a float32 scale for each output channel, or for each group of inputs."""

import dataclasses
import math
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sgl_jax.models.quantised import Matrix, Quantised
from sgl_jax.models.spec import ExpertSite, Site, WeightSpec
from sgl_jax.models.stored import StoredTensor
from sgl_jax.ops.quantized_matmul.api import Planes, QuantizedGroupedMatmul, QuantizedMatmul, Rounding

_LARGEST = {
    name: float((ml_dtypes.finfo if name.startswith("float") else ml_dtypes.iinfo)(name).max)
    for name in ("int8", "int4", "float8_e4m3fn")
}
_STORED = {"int8": "I8", "int4": "I4", "float8_e4m3fn": "F8_E4M3"}  # dtypes of stored values
_VALUES = 1 << 20  # values that are rounded at a time


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Scheme in which value [o, i] stands for value * scale[o, i // group], less the group's offset where there are offsets.
    With one group, the scale is the channel's.

    Scales follow the output axis wherever it is divided over devices; a group of inputs is never divided.
    """

    dtype: str  # dtype of the values: "int8", "int4", "float8_e4m3fn"
    group: int | None = None  # inputs that share a scale; None: all inputs of a channel do
    offsets: bool = False  # each scale has an offset, which is subtracted
    rounding: Rounding | None = None  # to what tokens are rounded before a product; None: they are not
    exempt: tuple[str, ...] = ("moe.router", "moe.shared_gate", "lm_head")  # sites of matrices that stay plain

    def __str__(self) -> str:
        shared = f"in groups of {self.group}{' with offsets' if self.offsets else ''}" if self.group else "by output"
        return f"{self.dtype} {shared}{f', tokens rounded to {self.rounding}' if self.rounding else ''}"

    def declare(self, site: Site | ExpertSite, spec: WeightSpec) -> Matrix[WeightSpec]:
        """Declare values of the scheme's dtype and scales for the same rows. Raises ValueError if a group is cut."""
        if site in self.exempt:
            return spec
        inputs, group = spec.shape[-1], self.group or spec.shape[-1]
        if inputs % group:
            cut = f"{site}: its {inputs} inputs on a device are not whole groups of {group} with one scale"
            raise ValueError(f"{cut}; divide the model over fewer devices, or give --quantization int8")
        shape, axes = (*spec.shape[:-1], inputs // group), (*spec.axes[:-1], spec.axes[-1] if self.group else None)
        scales = dataclasses.replace(spec, shape=shape, axes=axes, dtype="float32")
        values = dataclasses.replace(spec, dtype=self.dtype, column_unit=self.group or 1)
        return Quantised(values, scales, self, scales if self.offsets else None)

    def read(self, tensor: StoredTensor) -> Quantised[StoredTensor]:
        """Return the stored values and scales where they have this form, else those that its floats are rounded to."""
        scales, planes = (*tensor.shape[:-1], tensor.shape[-1] // (self.group or tensor.shape[-1])), tensor.planes
        if planes and planes["values"].dtype == _STORED[self.dtype] and planes["scales"].shape == scales:
            offsets = planes.get("offsets")
            if self.offsets or offsets is None:
                zeros = planes["scales"].changed(np.zeros_like) if self.offsets else None
                return Quantised(planes["values"], planes["scales"], self, offsets or zeros)

        step = max(1, _VALUES // math.prod(tensor.shape[1:]))  # a whole matrix has as few scales as a block has values

        def plane(part: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], dtype: str) -> StoredTensor:
            def rows(start: int, stop: int) -> np.ndarray:
                blocks = (tensor.rows(at, min(at + step, stop)) for at in range(start, stop, step))
                return np.concatenate([part(block) for block in blocks])

            return dataclasses.replace(tensor, shape=shape, dtype=dtype, rows=rows, planes={})

        values = plane(lambda block: self.quantise(block)[0], tensor.shape, self.dtype)
        sizes = plane(lambda block: self._scales(self._groups(block)), scales, "float32")
        return Quantised(values, sizes, self, sizes.changed(np.zeros_like) if self.offsets else None)

    def quantise(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values [..., O, I] and scales [..., O, groups]. A group's largest value becomes that of the dtype."""
        groups, largest = self._groups(matrix), _LARGEST[self.dtype]
        scales = self._scales(groups)
        values = groups / np.where(scales == 0, 1, scales)[..., None]
        values = values if self.dtype.startswith("float") else np.rint(values)
        return np.clip(values, -largest, largest).astype(self.dtype).reshape(matrix.shape), scales

    def _groups(self, matrix: np.ndarray) -> np.ndarray:
        return matrix.astype(np.float32, copy=False).reshape(*matrix.shape[:-1], -1, self.group or matrix.shape[-1])

    def _scales(self, groups: np.ndarray) -> np.ndarray:
        return np.abs(groups).max(-1) / np.float32(_LARGEST[self.dtype])

    def multiply(
        self, x: Float[Array, "T I"], w: Quantised[jax.Array], matmul: QuantizedMatmul, out_dtype: DTypeLike | None
    ) -> Float[Array, "T O"]:
        return matmul(x, Planes(**w.planes), self.rounding, out_dtype)

    def multiply_grouped(
        self,
        x: Float[Array, "M I"],
        w: Quantised[jax.Array],
        layer: Int[Array, ""] | int,
        group_sizes: Int[Array, " E"],
        matmul: QuantizedGroupedMatmul,
    ) -> Float[Array, "M O"]:
        return matmul(x, Planes(**w.planes), layer, group_sizes, self.rounding)
