"""The grouped matmul of experts as libtpu compiles it: the matrices are read where they lie, never copied."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sgl_jax.ops.grouped_matmul import pallas_tpu
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.topology import parse, tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LAYERS = 3


@pytest.mark.parametrize("chip", ["v6e-1", "v7x-1"])
@pytest.mark.parametrize(
    ("rows", "experts", "outputs", "inputs"),
    [(512, 128, 1536, 2048), (16384, 128, 1536, 2048), (512, 128, 2048, 192), (2048, 8, 3584, 4096)],
    ids=["qwen3-30b gate_up, 64 tokens", "2048 tokens", "down over 4 chips", "mixtral over 4 chips"],
)
def test_a_layer_of_a_stack_is_not_copied(chip: str, rows: int, experts: int, outputs: int, inputs: int) -> None:
    placement = Placement.over(tpu_devices(parse(chip))[:1])

    def layers(x, w, sizes):
        def body(total, layer):
            out = pallas_tpu.grouped_matmul(x + total, w, layer, sizes)
            return out.sum().astype(x.dtype), None

        return lax.scan(body, jnp.bfloat16(0), jnp.arange(LAYERS))[0]

    def abstract(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding())

    args = abstract((rows, inputs)), abstract((LAYERS, experts, outputs, inputs)), abstract((experts,), jnp.int32)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = jax.jit(layers).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    matrices = experts * outputs * inputs * 2
    activations = rows * (inputs + outputs) * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * activations + (1 << 20) < matrices / 2
