"""Implementations that a step is built with, one for each contract."""

import dataclasses
import functools

from sgl_jax.ops.adapter_addend import AdapterAddend, plain_addend
from sgl_jax.ops.attention.backends import Backend
from sgl_jax.ops.cpu.library import Library
from sgl_jax.ops.dense import DenseProduct, plain_product
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.quantized_matmul import native
from sgl_jax.ops.quantized_matmul.api import QuantizedGroupedMatmul, QuantizedMatmul


@dataclasses.dataclass(frozen=True)
class Kernels:
    attention: Backend
    grouped_matmul: GroupedMatmul
    dense: DenseProduct = plain_product
    quantized: QuantizedMatmul = native.quantized_matmul
    quantized_experts: QuantizedGroupedMatmul | None = None  # None: this layer's matrices are dequantised first
    adapters: AdapterAddend = plain_addend
    library: Library | None = None  # for operations that have no contract here

    @property
    def quantized_grouped(self) -> QuantizedGroupedMatmul:
        plain = functools.partial(native.quantized_grouped_matmul, grouped_matmul=self.grouped_matmul)
        return self.quantized_experts or plain
