"""The products of experts as libtpu compiles them: the matrices are read where they lie, never copied."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.typing import DTypeLike

from sgl_jax.models.layers import gated
from sgl_jax.ops.experts.pallas_tpu import routed_experts
from sgl_jax.ops.grouped_matmul import pallas_tpu
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.topology import parse, tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LAYERS, BF16 = 3, jnp.bfloat16


@pytest.mark.parametrize("chip", ["v6e-1", "v7x-1"])
@pytest.mark.parametrize(
    ("rows", "experts", "outputs", "inputs"),
    [(512, 128, 1536, 2048), (16384, 128, 1536, 2048), (512, 128, 2048, 192), (2048, 8, 3584, 4096)],
    ids=["qwen3-30b gate_up, 64 tokens", "2048 tokens", "down over 4 chips", "mixtral over 4 chips"],
)
def test_a_layer_of_a_stack_is_not_copied(chip: str, rows: int, experts: int, outputs: int, inputs: int) -> None:
    def product(x, w, sizes, layer):
        return pallas_tpu.grouped_matmul(x, w, layer, sizes)

    shapes = ((rows, inputs), BF16), ((LAYERS, experts, outputs, inputs), BF16), ((experts,), jnp.int32)
    matrices = experts * outputs * inputs * 2
    activations = rows * (inputs + outputs) * 2
    assert _temporaries(chip, product, *shapes) < 2 * activations + (1 << 20) < matrices / 2


@pytest.mark.parametrize("chip", ["v6e-1", "v7x-1"])
@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "experts", "choices"),
    [
        (2048, 2048, 192, 128, 8),
        (2048, 2048, 768, 32, 8),
        (16, 2048, 192, 128, 8),
        (2048, 7168, 2048, 8, 8),
        (2048, 4096, 3584, 8, 2),
    ],
    ids=["qwen3-30b, tp 4", "ep 4", "decode", "deepseek-v3, ep 32", "mixtral, tp 4"],
)
def test_tokens_are_not_copied_for_each_choice(
    chip: str, tokens: int, width: int, neurons: int, experts: int, choices: int
) -> None:
    """Beside the tokens as float32 there are only the neurons of items, of up to 256 rows each."""
    silu = functools.partial(gated, activation="silu")

    def product(x, gate_up, down, expert, weights, layer):
        return routed_experts(x, gate_up, down, layer, expert, weights, silu)

    chosen = (tokens, choices)
    matrices = ((LAYERS, experts, 2 * neurons, width), BF16), ((LAYERS, experts, width, neurons), BF16)
    shapes = ((tokens, width), BF16), *matrices, (chosen, jnp.int32), (chosen, jnp.float32)
    items = 2 * neurons * (tokens * choices + 256 * experts)
    assert _temporaries(chip, product, *shapes) < 14 * tokens * width + items + (1 << 20)


def _temporaries(chip: str, product: Callable[..., jax.Array], *shapes: tuple[tuple[int, ...], DTypeLike]) -> int:
    """Compile a loop over layers whose body is the product. Return the bytes it needs beside its arguments."""
    placement = Placement.over(tpu_devices(parse(chip))[:1])

    def layers(x, *others):
        def body(total, layer):
            return product(x + total, *others, layer).sum().astype(x.dtype), None

        return lax.scan(body, jnp.bfloat16(0), jnp.arange(LAYERS))[0]

    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding()) for shape, dtype in shapes]
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = jax.jit(layers).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
