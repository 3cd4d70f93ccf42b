"""Every format of quantised checkpoints is read exactly: the floats that its codes stand for, and its codes as they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import checkpoints
import quantise
from messages import says
from quantise import E2M1, WRITERS, coded, compressed, fp8, settings
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config, tensor_names
from sgl_jax.models.formats.find import weight_format
from sgl_jax.models.formats.form import named
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.plan import plan_weights
from sgl_jax.models.quantised import Quantised
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.safetensors_file import read_safetensors
from sgl_jax.models.scaled import Scaled
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.stored_names import named_tensors

DATA = checkpoints.DATA / "quant"
FOLDERS = sorted(folder.name for folder in DATA.iterdir())
RNG = np.random.default_rng(0)


def read(folder: Path, said: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Mapping[str, StoredTensor]:
    """Write tensors to a file, and return them in the view of a format."""
    quantise.save(folder / "x.safetensors", tensors)
    found = weight_format(RawConfig({"quantization_config": said}))
    assert found is not None
    return found.view(read_safetensors(folder / "x.safetensors"))


def in_blocks(tensor: StoredTensor, step: int) -> np.ndarray:
    number = tensor.shape[0]
    return np.concatenate([tensor.rows(at, min(at + step, number)) for at in range(0, number, step)])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_stands_for_the_matrices_that_its_maker_computed(name: str) -> None:
    checkpoint = open_checkpoint(str(DATA / name))
    config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
    found = named_tensors(checkpoint.tensors, config, tensor_names(config))
    probes = json.loads((DATA / name / "oracle.json").read_text())["dequantised_probe"]
    assert len(probes) == 5
    for tensor, probe in probes.items():
        matrix = found[tensor].read()
        assert matrix.dtype == np.float32
        assert list(matrix.shape) == probe["shape"]
        np.testing.assert_array_equal(in_blocks(found[tensor], 7), matrix)
        sums = matrix.astype(np.float64)
        np.testing.assert_allclose([sums.sum(), np.abs(sums).sum()], [probe["sum"], probe["abs_sum"]], atol=1e-4)
        corners = [*matrix[0, :4], *matrix[-1, -4:]]
        np.testing.assert_allclose(corners, probe["row0_first4"] + probe["last_row_last4"], atol=1e-8)


INTEGERS = {
    "4 bits": coded(24, 64, 32),
    "4 bits, symmetric": coded(16, 48, 16, symmetric=True),
    "8 bits": coded(16, 64, 16, 8),
    "8 bits, symmetric": coded(16, 64, 64, 8, symmetric=True),
    "out of order": coded(16, 64, 16, symmetric=True, in_order=False),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("method", WRITERS)
def test_the_same_codes_in_any_layout_are_the_same_matrix(tmp_path: Path, method: str, kind: str) -> None:
    m = INTEGERS[kind]
    if method == "awq" and (m.bits == 8 or kind == "out of order"):
        return  # it has neither
    tensors = {f"a.{name}": array for name, array in WRITERS[method](m).items()}
    found = read(tmp_path, settings(method, m), tensors)
    assert list(found) == ["a.weight"]
    np.testing.assert_array_equal(found["a.weight"].read(), m.floats)
    np.testing.assert_array_equal(in_blocks(found["a.weight"], 5), m.floats)
    if kind == "out of order":
        assert not found["a.weight"].planes
        return
    group, half = int((m.groups == 0).sum()), 2 ** (m.bits - 1)
    held = Scaled(f"int{m.bits}", group, offsets=True).read(found["a.weight"])
    assert held.offsets is not None
    values, scales, offsets = held.values.read(), held.scales.read(), held.offsets.read()
    np.testing.assert_array_equal(values, m.codes - half)
    np.testing.assert_array_equal(scales, m.scales.astype(np.float32))
    np.testing.assert_array_equal(offsets, (m.zeros - half) * scales)
    if "symmetric" in kind and method != "awq":
        assert Scaled(f"int{m.bits}", group).read(found["a.weight"]).values is found["a.weight"].planes["values"]


SCALE = RNG.uniform(0.001, 0.1, (200, 300)).astype(np.float32)
VALUES = fp8(RNG.standard_normal((200, 300)) * 30)
INT8 = RNG.integers(-128, 128, (200, 300)).astype(np.int8)
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("said", "values", "scales"),
    [
        (BLOCKS, VALUES, {"a.weight_scale_inv": SCALE[:2, :3]}),
        ({"quant_method": "fp8"}, VALUES, {"a.weight_scale": SCALE[0, 0]}),
        ({"quant_method": "fbgemm_fp8"}, VALUES, {"a.weight_scale": SCALE[:, :1]}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, VALUES, {"a.weight_scale": SCALE[0, 0]}),
        (compressed(FLOAT8, "float-quantized"), VALUES, {"a.weight_scale": SCALE[:, :1].astype(ml_dtypes.bfloat16)}),
        (compressed(FLOAT8 | {"strategy": "tensor"}, "float-quantized"), VALUES, {"a.weight_scale": SCALE[0, :1]}),
        (compressed(FLOAT8 | {"strategy": "block"}, "float-quantized"), VALUES, {"a.weight_scale": SCALE[:2, :3]}),
        (compressed(CHANNEL, "int-quantized"), INT8, {"a.weight_scale": SCALE[:, :1]}),
    ],
    ids=lambda each: each.get("quant_method") if isinstance(each, dict) else None,
)
def test_eight_bits_times_the_scale_of_their_block(
    tmp_path: Path, said: dict, values: np.ndarray, scales: dict
) -> None:
    """A block at the edge is smaller; scalars and vectors count for all they can."""
    found = read(tmp_path, said, {"a.weight": values} | {name: np.asarray(scale) for name, scale in scales.items()})
    (scale,) = (np.atleast_2d(each).astype(np.float32) for each in scales.values())
    if scale.shape == (2, 3):
        scale = scale.repeat(128, 0).repeat(128, 1)[:200, :300]
    wanted = values.astype(np.float32) * scale
    assert list(found) == ["a.weight"]
    np.testing.assert_array_equal(found["a.weight"].read(), wanted)
    np.testing.assert_array_equal(in_blocks(found["a.weight"], 33), wanted)


def test_scales_of_blocks_are_repeated_for_their_rows(tmp_path: Path) -> None:
    """Devices may hold them as scales of groups of inputs; a row of them is read for each row of values."""
    found = read(tmp_path, BLOCKS, {"a.weight": VALUES[:, :256], "a.weight_scale_inv": SCALE[:2, :2]})
    held = Scaled("float8_e4m3fn", 128).read(found["a.weight"])
    np.testing.assert_array_equal(held.values.read(), VALUES[:, :256])
    np.testing.assert_array_equal(held.scales.rows(120, 140), SCALE[:2, :2].repeat([8, 12], 0))


def test_zero_points_of_int8_channels(tmp_path: Path) -> None:
    zeros = RNG.integers(-9, 9, (200, 1)).astype(np.int8)
    tensors = {"a.weight": INT8, "a.weight_scale": SCALE[:, :1], "a.weight_zero_point": zeros}
    found = read(tmp_path, compressed(CHANNEL | {"symmetric": False}, "int-quantized"), tensors)
    np.testing.assert_array_equal(found["a.weight"].read(), (INT8.astype(np.float32) - zeros) * SCALE[:, :1])


def test_experts_that_are_stored_together(tmp_path: Path) -> None:
    values, scales = INT8.reshape(4, 50, 300), SCALE[:, :1].reshape(4, 50, 1)
    found = read(
        tmp_path, compressed(CHANNEL, "int-quantized"), {"experts.down_proj": values, "experts.down_proj_scale": scales}
    )
    np.testing.assert_array_equal(found["experts.down_proj"].rows(1, 3), (values * scales)[1:3])
    held = Scaled("int8").read(found["experts.down_proj"])
    np.testing.assert_array_equal(held.values.read(), values)
    np.testing.assert_array_equal(held.scales.rows(1, 3), scales[1:3])


@pytest.mark.parametrize("layout", ["modelopt", "nvfp4", "mxfp4"])
def test_pairs_of_four_bit_floats(tmp_path: Path, layout: str) -> None:
    octets = RNG.integers(0, 256, (6, 32), np.uint8)
    values = np.stack([E2M1[octets & 15], E2M1[octets >> 4]], axis=-1).reshape(6, 64)
    sixteenth, factor = fp8(RNG.uniform(1, 400, (6, 4))), np.float32(0.003)
    exponents = RNG.integers(120, 130, (6, 2), np.uint8)
    four = {"num_bits": 4, "type": "float", "group_size": 16}
    said, tensors, scales = {
        "modelopt": (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"weight": octets, "weight_scale": sixteenth, "weight_scale_2": np.asarray(factor), "input_scale": factor},
            sixteenth.astype(np.float32) * factor,
        ),
        "nvfp4": (
            compressed(four | {"strategy": "tensor_group"}, "nvfp4-pack-quantized"),
            {"weight_packed": octets, "weight_scale": sixteenth, "weight_global_scale": 1 / factor[None]},
            sixteenth.astype(np.float32) / (1 / factor[None]),
        ),
        "mxfp4": (
            compressed(four | {"strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"),
            {"weight_packed": octets, "weight_scale": exponents},
            np.float32(2) ** (exponents.astype(np.float32) - 127),
        ),
    }[layout]
    found = read(tmp_path, said, {f"a.{name}": np.asarray(array) for name, array in tensors.items()})
    np.testing.assert_array_equal(found["a.weight"].read(), values * scales.repeat(64 // scales.shape[1], axis=1))


def test_groups_of_a_config_name_modules(tmp_path: Path) -> None:
    """One names modules by a pattern, the other by their class; the config leaves the third out, but its tensor decides."""
    m = coded(16, 64, 16, symmetric=True)
    said = compressed(CHANNEL, "mixed-precision")
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    said["config_groups"]["group_1"] = {"targets": ["re:.*experts.*"], "weights": four}
    tensors = {f"layers.0.experts.1.up.{name}": array for name, array in WRITERS["pack-quantized"](m).items()}
    tensors |= {"layers.0.o.weight": INT8, "layers.0.o.weight_scale": SCALE[:, :1], "lm_head.weight": SCALE}
    found = read(tmp_path, said, tensors)
    np.testing.assert_array_equal(found["layers.0.experts.1.up.weight"].read(), m.floats)
    np.testing.assert_array_equal(found["layers.0.o.weight"].read(), INT8 * SCALE[:, :1])
    np.testing.assert_array_equal(found["lm_head.weight"].read(), SCALE)
    found = weight_format(RawConfig({"quantization_config": said}))
    assert found is not None
    assert [found.skips(name) for name in ("lm_head", "layers.0.o")] == [True, False]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("lm_head", "lm_head", "lm_head2"),
        ("mlp.gate", "model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj"),
        ("model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.01.mlp.down_proj"),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate_up"),
        ("model.layers.*.self_attn", "model.layers.7.self_attn", "model.layers.7.mlp"),
        ("*self_attn*", "model.layers.7.self_attn.q_proj", "model.layers.7.mlp"),
    ],
)
def test_lists_of_modules(pattern: str, yes: str, no: str) -> None:
    assert named(yes, [pattern])
    assert not named(no, [pattern])


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(ModelError, match=r"quantization_config .*'re:\('"):
        named("lm_head", ["re:("])


Q, LAYER0 = "model.layers.0.self_attn.q_proj", "model.layers.0."


def damaged(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return tensors | {f"{Q}.{name}": tensors[f"{Q}.{name}"][:-1]}


@pytest.mark.parametrize(
    ("folder", "drop", "short", "said", "message"),
    [
        ("gptq-int4-actorder-qwen2", "scales", "", {}, f"{Q}.qweight (I32: {Q}.scales is missing"),
        ("gptq-int4-actorder-qwen2", "qzeros", "", {}, f"{Q}.qzeros is missing"),
        ("gptq-int4-actorder-qwen2", "", "g_idx", {}, "g_idx [127] … 2 groups … 128 inputs"),
        ("gptq-int4-actorder-qwen2", "", "", {"group_size": 32}, f"{Q}.scales is [128, 2] … 1 x 32 … [128, 4]"),
        ("gptq-int4-actorder-qwen2", "", "", {"bits": 8}, f"{Q}.scales is … 1 x 64"),
        ("ct-w4a16-asym-qwen3", "weight_scale", "", {}, f"{Q}.weight_packed (I32: {Q}.weight_scale is missing"),
        ("ct-w4a16-asym-qwen3", "weight_zero_point", "", {}, f"{Q}.weight_zero_point is missing"),
        ("ct-w4a16-asym-qwen3", "weight_shape", "", {}, f"{Q}.weight_shape is missing"),
        ("ct-w4a16-asym-qwen3", "", "weight_packed", {}, "words are [255, 16] … [256, 16] … [256, 128] in 4 bits"),
        ("ct-w4a16-asym-qwen3", "", "weight_zero_point", {}, f"{Q}.weight_zero_point is [248, 2] … [256, 2]"),
        ("ct-w8a8-qwen2", "", "weight_scale", {}, f"{Q}.weight (I8: {Q}.weight_scale is [127, 1] … [128, 1]"),
        ("ct-w8a8-qwen2", "", "", {"num_bits": 4}, f"{Q}.weight (I8: quantization_config … int of 4 bits"),
        ("ct-w8a8-qwen2", "", "", {"type": "float"}, f"{Q}.weight (I8: quantization_config … float of 8 bits"),
        ("fp8-block-qwen3_moe", "weight_scale_inv", "", {}, f"{Q}.weight_scale_inv … is missing"),
        ("fp8-block-qwen3_moe", "", "", {"weight_block_size": [64, 64]}, "[2, 1] … 64 x 64 … [4, 2]"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    tmp_path: Path, folder: str, drop: str, short: str, said: dict, message: str
) -> None:
    config = json.loads((DATA / folder / "config.json").read_text())
    inner = config["quantization_config"]
    inner = inner["config_groups"]["group_0"]["weights"] if "config_groups" in inner else inner
    inner.update(said)
    tensors = {
        name: tensor.read().reshape(tensor.shape)
        for name, tensor in open_checkpoint(str(DATA / folder)).tensors.items()
    }
    tensors.pop(f"{Q}.{drop}", None)
    if short:
        tensors[f"{Q}.{short}"] = tensors[f"{Q}.{short}"][:-1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantise.save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ModelError) as error:
        plan(tmp_path)
    assert says(str(error.value), message), error.value


def plan(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
    plan_weights(checkpoint.tensors, config, tensor_names(config), source=str(folder))


def test_tensors_that_belong_to_nothing_are_named_and_scales_of_tokens_and_kv_are_not(tmp_path: Path) -> None:
    shutil.copytree(DATA / "ct-fp8-static-llama", tmp_path / "x", copy_function=shutil.copyfile)
    tensors = {
        name: tensor.read().reshape(tensor.shape)
        for name, tensor in open_checkpoint(str(tmp_path / "x")).tensors.items()
    }
    one = np.ones((), np.float32)
    beside = {
        f"{LAYER0}self_attn.{name}": one for name in ("k_scale", "v_scale", "k_proj.k_scale", "k_proj.output_scale")
    }
    quantise.save(tmp_path / "x" / "model.safetensors", tensors | beside)
    plan(tmp_path / "x")
    quantise.save(tmp_path / "x" / "model.safetensors", tensors | {f"{Q}.weight_scale_3": one, f"{Q}.bias": one[None]})
    with pytest.raises(ModelError) as error:
        plan(tmp_path / "x")
    assert says(str(error.value), f"no place for: {Q}.bias, {Q}.weight_scale_3")


def test_symmetric_weights_have_no_zero_points(tmp_path: Path) -> None:
    m = coded(16, 64, 16)
    tensors = {f"a.{name}": array for name, array in WRITERS["gptq"](m).items()}
    found = read(tmp_path, settings("gptq", m) | {"sym": True}, tensors)["a.weight"]
    np.testing.assert_array_equal(found.read(), m.floats)  # whatever the config says
    with pytest.raises(ModelError, match=r"a\.qzeros .*zero points.*sym"):
        found.planes["scales"].read()


@pytest.mark.parametrize("method", ["gptq", "pack-quantized"])
def test_groups_that_are_called_in_order_are_so_or_are_not_read_as_they_are(tmp_path: Path, method: str) -> None:
    """They would be rounded again to their own few bits."""
    m = INTEGERS["out of order"]
    said = settings(method, m)
    if method == "gptq":
        said["desc_act"] = False
    else:
        said["config_groups"]["group_0"]["weights"]["actorder"] = None
    tensors = {f"a.{name}": array for name, array in WRITERS[method](m).items()}
    found = read(tmp_path, said, tensors)["a.weight"]
    np.testing.assert_array_equal(found.read(), m.floats)
    values, scales = Scaled("int8").quantise(m.floats)
    again = Scaled("int8").read(found)
    np.testing.assert_array_equal(again.values.read(), values)
    np.testing.assert_array_equal(again.scales.read(), scales)
    with pytest.raises(ModelError) as error:
        Scaled("int4", 16).read(found).values.read()
    assert says(str(error.value), "a. … g_idx … out of order … desc_act, actorder … --quantization int8-weight-only")


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.* awq, compressed-tensors, "),
        ({"quant_method": "marlin"}, "'marlin'"),
        ({"load_in_4bit": True}, "no quant_method, but load_in_4bit"),
        ({"quant_method": "awq", "bits": 3}, r"quantization_config\.bits .* 3"),
        ({"quant_method": "awq", "version": "gemv"}, r"quantization_config\.version .*'gemv'"),
        ({"quant_method": "gptq"}, "`bits`"),
        ({"quant_method": "gptq", "bits": 2}, r"quantization_config\.bits .* 2"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"checkpoint_format .*'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic .*'\+:\.\*down\.\*'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"quantization_config\.fmt .*'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size .*2"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"quant_algo .*'W4A8_AWQ'"),
        (compressed(CHANNEL, "marlin-24"), r"quantization_config\.format .*'marlin-24'"),
        (compressed(CHANNEL | {"num_bits": 2}, "pack-quantized"), r"num_bits .* 2"),
        (compressed(CHANNEL, "dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed(CHANNEL, "dense") | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(said: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        weight_format(RawConfig({"quantization_config": said}))


def test_a_config_beside_config_json_is_modelopt_s(tmp_path: Path) -> None:
    """The same values in ModelOpt's layout: scalars, an exclude list, scales of a KV cache."""
    source = open_checkpoint(str(DATA / "ct-fp8-static-llama"))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    tensors = {
        name: tensor.read().reshape(() if name.endswith("scale") else tensor.shape).astype(np.float32)
        if name.endswith("scale")
        else tensor.read().reshape(tensor.shape)
        for name, tensor in source.tensors.items()
    }
    said = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    scales = {f"{LAYER0}self_attn.{of}_proj.{of}_scale": np.full((), n, np.float32) for of, n in (("k", 2), ("v", 3))}
    quantise.save(tmp_path / "model.safetensors", tensors | scales)
    plan(tmp_path)
    found = open_checkpoint(str(tmp_path))
    views = []
    for checkpoint in (source, found):
        config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
        views.append(named_tensors(checkpoint.tensors, config, tensor_names(config)))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(views[1][name].read(), views[0][name].read())
    config = dataclasses.replace(config, kv_dtype="float8_e4m3fn")
    leaves = {leaf.path: leaf for leaf in plan_weights(found.tensors, config, tensor_names(config), source="m")}
    for path, scales in ((".layers[0].kv_scales", [2, 3]), (".layers[1].kv_scales", [1, 1])):
        (piece,) = leaves[path].pieces
        assert piece.read().tolist() == scales


def scales_of_kv(folder: Path, model: Path, dtype: str, **scales: float | list[float]) -> list[float]:
    """Scales that the first layer of a model has for a KV cache of this dtype, where its files also have these."""
    checkpoint = open_checkpoint(str(model))
    stored = {f"{LAYER0}self_attn.{name}": np.array(scale, np.float32) for name, scale in scales.items()}
    quantise.save(folder / "scales.safetensors", stored)
    config = dataclasses.replace(decoder_config(checkpoint.config), kv_dtype=dtype)
    tensors = {**checkpoint.tensors, **read_safetensors(folder / "scales.safetensors")}
    leaves = {leaf.path: leaf for leaf in plan_weights(tensors, config, tensor_names(config), source="m")}
    return leaves[".layers[0].kv_scales"].pieces[0].read().tolist()


def test_a_scale_of_k_without_that_of_v_is_named(stories260k: Path, tmp_path: Path) -> None:
    attention = f"{LAYER0}self_attn"
    for stored, missing in (("k_scale", "v_scale"), ("v_scale", "k_scale")):
        with pytest.raises(ModelError) as error:
            scales_of_kv(tmp_path, stories260k, "float8_e4m3fn", **{stored: 2})
        wanted = f"missing tensors: {attention}.{missing} (beside {attention}.{stored}; --kv-cache-dtype … auto … int8"
        assert says(str(error.value), wanted)
        assert scales_of_kv(tmp_path, stories260k, "int8", **{stored: 2})  # which measures its own
    assert scales_of_kv(tmp_path, stories260k, "float8_e4m3fn", kv_scale=2) == [2, 2]


def test_a_latent_vector_has_one_scale(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert scales_of_kv(tmp_path, checkpoint("deepseek_v3"), "float8_e4m3fn", k_scale=2) == [2, 1]


@pytest.mark.parametrize("scale", [0, -1, np.inf, np.nan, [1, 2]])
def test_scales_of_kv_are_single_numbers_above_0(stories260k: Path, tmp_path: Path, scale: float | list[float]) -> None:
    with pytest.raises(ModelError, match=r"v_scale is \[.*\]; .*one scale for K and one for V, above 0"):
        scales_of_kv(tmp_path, stories260k, "float8_e4m3fn", k_scale=1, v_scale=scale)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v2-lite", "glm4_moe", "mixtral", "phi3", "qwen2_moe-mixed", "gemma3_text"]
)
def test_every_family_s_matrices_may_be_quantised(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """In blocks that divide no matrix evenly: latent attention's, fused ones, experts'. Float for float those of a plain checkpoint
    with the same values; held as int8, the up-projections of latent attention stay floats."""
    source = open_checkpoint(str(checkpoint(family)))
    plain, quantised = {}, {}
    for name, tensor in source.tensors.items():
        array = tensor.read()
        if array.ndim != 2 or "embed" in name or name.endswith(("lm_head.weight", "gate.weight")):
            plain[name] = quantised[name] = array
            continue
        values, (rows, columns) = fp8(array.astype(np.float32) * 8), array.shape
        scales = RNG.uniform(0.1, 0.2, (-(-rows // 48), -(-columns // 24))).astype(np.float32)
        plain[name] = values.astype(np.float32) * scales.repeat(48, 0).repeat(24, 1)[:rows, :columns]
        quantised |= {name: values, f"{name}_scale_inv": scales}
    said = {"quantization_config": BLOCKS | {"weight_block_size": [48, 24]}}
    trees = []
    for folder, config, tensors in (("plain", {}, plain), ("quantised", said, quantised)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(source.config | config))
        quantise.save(tmp_path / folder / "model.safetensors", tensors)
        found = open_checkpoint(str(tmp_path / folder))
        trees.append((found, decoder_config(found.config, tensors=found.tensors)))
    floats, same = (load_weights(found, config, "float32") for found, config in trees)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(floats), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    found, config = trees[1]
    held = load_weights(found, dataclasses.replace(config, weight_scheme=Scaled("int8")), "float32")
    for one, two in zip(floats.layers, held.layers, strict=True):
        assert isinstance(two.o, Quantised)
        step = np.asarray(two.o.scales)
        assert np.abs(np.asarray(two.o.values) * step - one.o).max() <= step.max() * 0.51
        if one.mla is not None and two.mla is not None:
            np.testing.assert_array_equal(one.mla.k_up, two.mla.k_up)
            np.testing.assert_array_equal(one.mla.v_up, two.mla.v_up)
