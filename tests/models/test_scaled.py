"""Quantised matrices as leaves of the weights: their numbers, their shards and their trees."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.linear import grouped_linear, linear
from sgl_jax.models.loader import load_weights, random_weights
from sgl_jax.models.quantised import Quantised
from sgl_jax.models.scaled import Scaled
from sgl_jax.models.shard import shard_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.models.weights import declare
from sgl_jax.ops.grouped_matmul import native, reference
from sgl_jax.ops.quantized_matmul.api import Planes
from sgl_jax.ops.quantized_matmul.native import dequantized, quantized_grouped_matmul
from sgl_jax.parallel.grid import Grid
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.placed_weights import abstract_weights, stack_layers, weight_axes, weight_bytes
from shards import cut, in_memory

RNG = np.random.default_rng(0)
SCHEMES = [Scaled(dtype, group) for dtype in ("int8", "int4", "float8_e4m3fn") for group in (None, 16)]
QUANTISED = functools.partial(quantized_grouped_matmul, grouped_matmul=native.grouped_matmul)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def quantised(scheme: Scaled, matrix: np.ndarray) -> Quantised[jax.Array]:
    values, scales = scheme.quantise(matrix)
    return Quantised(jnp.asarray(values), jnp.asarray(scales), scheme)


def by_hand(w: Quantised[jax.Array], group: int) -> np.ndarray:
    """Dequantise value by value in float64."""
    values, scales = np.asarray(w.values).astype(np.float64), np.asarray(w.scales, np.float64)
    out = np.zeros_like(values)
    for at in np.ndindex(values.shape):
        out[at] = values[at] * scales[(*at[:-1], at[-1] // group)]
    return out


@schemes
def test_rounding_errs_by_half_a_step_of_the_group_at_most(scheme: Scaled) -> None:
    matrix = RNG.standard_normal((6, 32)).astype(np.float32) * np.linspace(0.01, 5, 6, dtype=np.float32)[:, None]
    w = quantised(scheme, matrix)
    group = scheme.group or 32
    found = by_hand(w, group)
    assert (w.values.dtype, w.scales.shape) == (scheme.dtype, (6, 32 // group))
    largest = np.abs(matrix).reshape(6, -1, group).max(-1).repeat(group, axis=-1)
    if scheme.dtype == "float8_e4m3fn":
        step = np.maximum(np.abs(matrix) / 8, largest / 448 / 512)  # three bits after the first; subnormals of 2 ** -9
    else:
        step = largest / {"int8": 127, "int4": 7}[scheme.dtype]
    assert (np.abs(found - matrix) <= step / 2 * 1.001).all()
    np.testing.assert_allclose(dequantized(Planes(**w.planes)), found, rtol=1e-6)


def test_a_group_of_zeros_stays_zero() -> None:
    w = quantised(Scaled("int8", 4), np.zeros((2, 8), np.float32))
    assert not np.asarray(dequantized(Planes(**w.planes))).any()


@schemes
def test_products_are_those_of_the_dequantised_matrix(scheme: Scaled) -> None:
    group = scheme.group or 32
    x = RNG.standard_normal((5, 32)).astype(np.float32)
    w = quantised(scheme, RNG.standard_normal((6, 32)).astype(np.float32))
    np.testing.assert_allclose(linear(jnp.asarray(x), w, site="o"), x @ by_hand(w, group).T, rtol=1e-4, atol=1e-5)
    experts = quantised(scheme, RNG.standard_normal((2, 3, 6, 32)).astype(np.float32))
    sizes = jnp.array([2, 0, 3], jnp.int32)
    multiply = jax.jit(
        lambda x, w, layer: grouped_linear(
            x, w, layer, sizes, native.grouped_matmul, QUANTISED, site="moe.experts.down"
        )
    )
    wanted = reference.grouped_matmul(x, by_hand(experts, group), 1, sizes)
    np.testing.assert_allclose(multiply(jnp.asarray(x), experts, jnp.int32(1)), wanted, rtol=1e-4, atol=1e-5)


QKV = WeightSpec((48, 32), ("heads", "model"), "bfloat16", parts=(32, 8, 8), unit=4)
DOWN = WeightSpec((8, 64), ("model", "ffn"), "bfloat16")
UP = WeightSpec((4, 16, 32), ("experts", "expert_ffn", "model"), "bfloat16", parts=(8, 8))


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("spec", [QKV, DOWN, UP], ids=["qkv", "down", "experts"])
@pytest.mark.parametrize("grid", [Grid(2), Grid(4), Grid(2, data=2), Grid(4, expert=2)], ids=lambda grid: grid.flags)
def test_a_shard_of_a_quantised_matrix_is_the_matrix_s_shard_quantised(
    spec: WeightSpec, group: int | None, grid: Grid
) -> None:
    """Scales are divided like their rows and their groups of columns."""
    scheme = Scaled("int8", group)
    declared = scheme.declare("qkv", spec)
    assert isinstance(declared, Quantised)
    w = quantised(scheme, RNG.standard_normal(spec.shape).astype(np.float32))
    whole = np.asarray(dequantized(Planes(**w.planes)))
    for device in range(grid.num_devices):
        shard = Quantised(
            jnp.asarray(cut(np.asarray(w.values), shard_of(declared.values, grid, device))),
            jnp.asarray(cut(np.asarray(w.scales), shard_of(declared.scales, grid, device))),
            scheme,
        )
        np.testing.assert_array_equal(dequantized(Planes(**shard.planes)), cut(whole, shard_of(spec, grid, device)))


def test_a_group_is_never_cut() -> None:
    declared = Scaled("int8", 32).declare("down", DOWN)  # two groups
    assert isinstance(declared, Quantised)
    assert shard_of(declared.scales, Grid(2), 1).columns == range(1, 2)
    for plane in (declared.values, declared.scales):
        with pytest.raises(ValueError, match=r"4 devices.* group"):
            shard_of(plane, Grid(4), 0)
    with pytest.raises(ValueError, match=r"down.* 16 .*32"):
        Scaled("int8", 32).declare("down", dataclasses.replace(DOWN, shape=(8, 16)))


def scheme_model(folder: Path, scheme: Scaled) -> DecoderConfig:
    return dataclasses.replace(decoder_config(json.loads((folder / "config.json").read_text())), weight_scheme=scheme)


@pytest.mark.parametrize("model", ["stories260k", "qwen2_moe-mixed", "deepseek_v2", "gpt_oss"])
def test_trees_with_quantised_leaves_are_declared_placed_and_stacked(
    checkpoint: Callable[[str], Path], model: str
) -> None:
    """Random weights are quantised as they are drawn; scan and list get the same tree."""
    config = scheme_model(checkpoint(model), Scaled("int4"))
    placement = Placement.over(jax.devices("cpu")[:1])
    weights = random_weights(config, "bfloat16")
    assert isinstance(weights.layers[0].o, Quantised)
    assert not isinstance(weights.embed, Quantised)
    total = sum(leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(weights))
    assert (
        total
        == weight_bytes(config, "bfloat16")
        < weight_bytes(dataclasses.replace(config, weight_scheme=None), "bfloat16")
    )

    def seen(tree: object) -> list[tuple[str, tuple[int, ...], str]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return [(jax.tree_util.keystr(path), leaf.shape, np.dtype(leaf.dtype).name) for path, leaf in flat]

    assert seen(weights) == seen(abstract_weights(config, "bfloat16", placement, stacked=False))
    stacked = stack_layers(weights, placement, declare(config, "bfloat16", stacked=True))
    abstract = abstract_weights(config, "bfloat16", placement, stacked=True)
    assert seen(stacked) == seen(abstract)
    assert jax.tree.structure(stacked) == jax.tree.structure(abstract)
    axes = weight_axes(config, stacked=True).layers[0].o
    assert (axes.values, axes.scales) == ((None, "model", "heads"), (None, "model", None))


def test_a_matrix_is_rounded_a_block_at_a_time() -> None:
    matrix = RNG.standard_normal((300, 16384)).astype(np.float32)
    read = []

    def rows(start: int, stop: int) -> np.ndarray:
        read.append(stop - start)
        return matrix[start:stop]

    scheme = Scaled("int8")
    planes = scheme.read(dataclasses.replace(in_memory("w", matrix), rows=rows))
    values, scales = scheme.quantise(matrix)
    np.testing.assert_array_equal(planes.scales.read(), scales)
    np.testing.assert_array_equal(planes.values.read(), values)
    assert (max(read), sum(read)) == (64, 600)


STORED = {"int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


@pytest.mark.parametrize("scheme", [Scaled("int8"), Scaled("int8", 4), Scaled("float8_e4m3fn")], ids=str)
def test_stored_values_and_scales_are_read_as_they_are(stories260k: Path, tmp_path: Path, scheme: Scaled) -> None:
    """Fused matrices are put together from the values and scales of their parts, and nothing is rounded again."""
    stored: dict[str, np.ndarray] = {}
    for name, tensor in load_file(stories260k / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            values, scales = scheme.quantise(tensor)
            stored[name] = values.view(np.uint8) if scheme.dtype == "float8_e4m3fn" else values
            stored[f"{name}_scale"] = scales[:, 0] if scheme.group is None else scales
        else:
            stored[name] = tensor
    kind = "int" if scheme.dtype == "int8" else "float"
    weights = {
        "num_bits": 8,
        "type": kind,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": f"{kind}-quantized",
            "config_groups": groups,
        }
    }
    plain = json.loads((stories260k / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | said))
    save_file(stored, tmp_path / "model.safetensors")
    if scheme.dtype == "float8_e4m3fn":
        _relabel(tmp_path / "model.safetensors", "U8", "F8_E4M3")
    config = scheme_model(tmp_path, scheme)
    layer = load_weights(open_checkpoint(str(tmp_path)), config, "float32").layers[2]
    prefix = "model.layers.2.self_attn."
    values = np.concatenate([stored[f"{prefix}{x}_proj.weight"].view(STORED[scheme.dtype]) for x in "qkv"])
    scales = np.concatenate(
        [stored[f"{prefix}{x}_proj.weight_scale"].reshape(len(stored[f"{prefix}{x}_proj.weight"]), -1) for x in "qkv"]
    )
    assert isinstance(layer.qkv, Quantised)
    np.testing.assert_array_equal(layer.qkv.values, values)
    np.testing.assert_array_equal(layer.qkv.scales, scales)
    config = scheme_model(stories260k, scheme)
    rounded = load_weights(open_checkpoint(str(stories260k)), config, "float32").layers[2]  # while it is read
    assert isinstance(rounded.qkv, Quantised)
    np.testing.assert_array_equal(rounded.qkv.values, values)
    np.testing.assert_array_equal(rounded.qkv.scales, scales)


def test_a_head_beside_its_embedding_has_the_embedding_s_numbers(stories260k: Path) -> None:
    checkpoint, scheme = open_checkpoint(str(stories260k)), Scaled("int8", rounding="int8", exempt=())
    config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
    assert config.tie_embeddings
    config = dataclasses.replace(config, weight_scheme=scheme, copies_head=True)
    weights = load_weights(checkpoint, config, "float32")
    assert isinstance(weights.lm_head, Quantised)
    values, scales = scheme.quantise(np.asarray(weights.embed))
    np.testing.assert_array_equal(weights.lm_head.values, values)
    np.testing.assert_array_equal(weights.lm_head.scales, scales)


def _relabel(path: Path, old: str, new: str) -> None:
    """Rename a dtype in a safetensors header: the package that writes it has no name for ml_dtypes' floats."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for entry in header.values():
        if entry.get("dtype") == old:
            entry["dtype"] = new
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
