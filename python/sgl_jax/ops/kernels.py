"""The implementations a step is built with, one for each contract."""

from __future__ import annotations

import dataclasses

from sgl_jax.ops.attention.api import Attention
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul


@dataclasses.dataclass(frozen=True)
class Kernels:
    attention: Attention
    grouped_matmul: GroupedMatmul
