"""Implementations that a step is built with, one for each contract."""

import dataclasses

from sgl_jax.ops.attention.backends import Backend
from sgl_jax.ops.dense import DenseProduct, plain_product
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul


@dataclasses.dataclass(frozen=True)
class Kernels:
    attention: Backend
    grouped_matmul: GroupedMatmul
    dense: DenseProduct = plain_product
