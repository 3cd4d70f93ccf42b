"""Implementations that a step is built with, one for each contract."""

import dataclasses
import functools

from jaxtyping import Array, Bool

from sgl_jax.ops.adapter_addend import AdapterAddend, plain_addend
from sgl_jax.ops.attention.backends import Backend
from sgl_jax.ops.cpu.library import Library
from sgl_jax.ops.dense.api import DenseProduct, GatedProduct, no_gated_product, plain_product
from sgl_jax.ops.dense.cpu_library import library_product
from sgl_jax.ops.experts.api import RoutedExperts
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.norm_rope import PLAIN_NORMS, Norms
from sgl_jax.ops.quantized_matmul import native
from sgl_jax.ops.quantized_matmul.api import QuantizedGroupedMatmul, QuantizedMatmul
from sgl_jax.ops.quantized_matmul.compiled import library_matmul


@dataclasses.dataclass(frozen=True)
class Kernels:
    attention: Backend
    grouped_matmul: GroupedMatmul
    dense: DenseProduct = plain_product
    quantized: QuantizedMatmul = native.quantized_matmul
    quantized_experts: QuantizedGroupedMatmul | None = None  # None: this layer's matrices are dequantised first
    routed_experts: RoutedExperts | None = None  # None: their products one by one, by the above
    adapters: AdapterAddend = plain_addend
    gated: GatedProduct = no_gated_product
    norms: Norms = PLAIN_NORMS
    library: Library | None = None  # for operations that have no contract here

    def over(self, live: Bool[Array, " T"] | None) -> "Kernels":
        """Return the kernels for products of T tokens of which only the live ones count; None: all do. Only the library for
        CPUs takes less time for fewer."""
        if live is None or self.library is None:
            return self
        products = {"dense": library_product(self.library, live), "quantized": library_matmul(self.library, live)}
        return dataclasses.replace(self, **products)

    @property
    def quantized_grouped(self) -> QuantizedGroupedMatmul:
        plain = functools.partial(native.quantized_grouped_matmul, grouped_matmul=self.grouped_matmul)
        return self.quantized_experts or plain
