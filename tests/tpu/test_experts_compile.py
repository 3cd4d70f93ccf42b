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

from sgl_jax.models.layers import GATED, gated
from sgl_jax.ops.experts.pallas_tpu import routed_experts
from sgl_jax.ops.grouped_matmul import pallas_tpu
from sgl_jax.parallel.placement import Placement
from sgl_jax.planning.topology import parse, tpu_devices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LAYERS, BF16 = 3, jnp.bfloat16
SILU = functools.partial(gated, activation="silu")


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


SHAPES = ("chip", "tokens", "width", "neurons", "experts", "choices")  # experts of one device


@pytest.mark.parametrize(
    SHAPES,
    [
        ("v6e-1", 2048, 2048, 192, 128, 8),
        ("v7x-1", 2048, 2048, 192, 128, 8),
        ("v6e-1", 2048, 2048, 768, 32, 8),
        ("v7x-1", 2048, 7168, 2048, 8, 8),
    ],
    ids=["qwen3-30b, tp 4", "qwen3-30b, tp 4, v7x", "qwen3-30b, ep 4", "deepseek-v3, ep 32"],
)
def test_tokens_are_not_copied_for_each_choice(
    chip: str, tokens: int, width: int, neurons: int, experts: int, choices: int
) -> None:
    """Beside the tokens as float32 there are only the neurons of items, of up to 256 rows each."""
    items = 2 * neurons * (tokens * choices + 256 * experts)
    product, shapes = _routed(tokens, width, neurons, experts, choices)
    assert (
        _temporaries(chip, product, *shapes)
        < 14 * tokens * width + items + (1 << 20)
        < 2 * choices * tokens * width + items
    )


@pytest.mark.parametrize(
    (*SHAPES, "dtype"),
    [
        ("v6e-1", 16, 2048, 192, 128, 8, BF16),
        ("v6e-1", 2048, 4096, 3584, 8, 2, BF16),
        ("v5e-1", 2048, 3584, 640, 64, 8, BF16),
        ("v5e-1", 512, 4096, 14336, 8, 2, BF16),
        ("v6e-1", 2048, 4096, 704, 16, 8, jnp.float32),
        ("v7x-1", 4096, 6144, 4096, 8, 2, BF16),
        ("v6e-1", 16384, 1024, 512, 32, 8, BF16),
    ],
    ids=[
        "decode",
        "mixtral, tp 4",
        "28 lines",
        "mixtral",
        "float32, whole neurons",
        "grok-1, tp 8",
        "scalars of 16384 tokens",
    ],
)
def test_other_shapes_fit(
    chip: str, tokens: int, width: int, neurons: int, experts: int, choices: int, dtype: DTypeLike
) -> None:
    product, shapes = _routed(tokens, width, neurons, experts, choices, dtype)
    assert _temporaries(chip, product, *shapes) > 0


def test_experts_whose_neurons_cannot_be_divided_are_left_to_grouped_matmul() -> None:
    def nothing(x, gate_up, down, expert, weights, layer):
        assert routed_experts(x, gate_up, down, layer, expert, weights, SILU, 16) is None
        return x

    _temporaries("v7x-1", nothing, *_routed(2048, 4096, 1600, 16, 2)[1])


@pytest.mark.parametrize("activation", GATED)
def test_every_activation_compiles(activation: str) -> None:
    product, shapes = _routed(64, 1024, 256, 8, 2, act=functools.partial(gated, activation=activation))
    assert _temporaries("v6e-1", product, *shapes) > 0


def _routed(tokens: int, width: int, neurons: int, experts: int, choices: int, dtype: DTypeLike = BF16, act=SILU):
    """Return the product of routed experts, and the shapes of its arguments."""

    def product(x, gate_up, down, expert, weights, layer):
        out = routed_experts(x, gate_up, down, layer, expert, weights, act, experts)
        assert out is not None
        return out

    matrices = ((LAYERS, experts, 2 * neurons, width), dtype), ((LAYERS, experts, width, neurons), dtype)
    chosen = (tokens, choices)
    return product, (((tokens, width), dtype), *matrices, (chosen, jnp.int32), (chosen, jnp.float32))


def _temporaries(chip: str, product: Callable[..., jax.Array], *shapes: tuple[tuple[int, ...], DTypeLike]) -> int:
    """Compile a loop over layers whose body is the product. Return the bytes it needs beside its arguments."""
    placement = Placement.over(tpu_devices(parse(chip))[:1])

    def layers(x, *others):
        def body(total, layer):
            return product(x + total, *others, layer).sum().astype(x.dtype), None

        return lax.scan(body, x.dtype.type(0), jnp.arange(LAYERS))[0]

    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding()) for shape, dtype in shapes]
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        compiled = jax.jit(layers).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
