"""Every declared weight is filled with the right numbers, and every misfit of a checkpoint is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from messages import says
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import OneDevice, aligned_empty, load_weights, random_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.shard import shard_of
from sgl_jax.models.weights import Weights, declare, head
from sgl_jax.parallel.grid import Grid
from shards import cut

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def load(path: Path, dtype="float32", **options) -> Weights:
    checkpoint = open_checkpoint(str(path))
    return load_weights(checkpoint, decoder_config(checkpoint.config), dtype, **options)


def copy_model(source: Path, target: Path, tensors: dict[str, np.ndarray], **config_changes) -> Path:
    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | config_changes
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def as_float32(folder: Path) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}


def assert_filled(weights: Weights, config, dtype: np.dtype) -> None:
    specs = jax.tree_util.tree_flatten_with_path(declare(config, dtype))[0]
    leaves = jax.tree_util.tree_flatten_with_path(weights)[0]
    wanted = [(path, spec.shape, np.dtype(spec.dtype)) for path, spec in specs]
    assert wanted == [(path, x.shape, x.dtype) for path, x in leaves]
    assert weights.layers[0].o.dtype == dtype
    assert weights.layers[0].attn_norm.dtype == np.float32


def test_each_weight_is_its_tensors_one_below_the_other(stories260k):
    weights, stored = load(stories260k), as_float32(stories260k)
    for i, layer in enumerate(weights.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv = [stored[f"{attention}{x}_proj.weight"] for x in "qkv"]
        np.testing.assert_array_equal(layer.qkv, np.concatenate(qkv))
        np.testing.assert_array_equal(layer.o, stored[f"{attention}o_proj.weight"])
        gate_up = [stored[f"{mlp}gate_proj.weight"], stored[f"{mlp}up_proj.weight"]]
        np.testing.assert_array_equal(layer.gate_up, np.concatenate(gate_up))
        np.testing.assert_array_equal(layer.down, stored[f"{mlp}down_proj.weight"])
        np.testing.assert_array_equal(layer.attn_norm, stored[f"model.layers.{i}.input_layernorm.weight"])
        np.testing.assert_array_equal(layer.mlp_norm, stored[f"model.layers.{i}.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(weights.embed, stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(head(weights), stored["model.embed_tokens.weight"])  # tied
    np.testing.assert_array_equal(weights.final_norm, stored["model.norm.weight"])


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "folder",
    ["llama", "llama-attn-bias", "llama-tied", "qwen2", "qwen2-tied", "qwen2-yarn", "qwen3", "qwen3-tied", "mistral"],
)
def test_oracle_checkpoints_fill_every_weight(checkpoint: Callable[[str], Path], folder, dtype):
    path = checkpoint(folder)
    config = decoder_config(json.loads((path / "config.json").read_text()))
    weights = load(path, dtype)
    assert_filled(weights, config, dtype)
    stored = as_float32(path)  # from bfloat16, so both dtypes hold it exactly
    head_name = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    np.testing.assert_array_equal(np.asarray(head(weights), np.float32), stored[head_name])
    layer, prefix = weights.layers[-1], f"model.layers.{config.num_layers - 1}."
    if config.qkv_bias:
        biases = np.concatenate([stored[f"{prefix}self_attn.{x}_proj.bias"] for x in "qkv"])
        np.testing.assert_array_equal(np.asarray(layer.qkv_bias, np.float32), biases)
    if config.mlp_bias:
        biases = np.concatenate([stored[f"{prefix}mlp.{x}_proj.bias"] for x in ("gate", "up")])
        np.testing.assert_array_equal(np.asarray(layer.gate_up_bias, np.float32), biases)
        np.testing.assert_array_equal(np.asarray(layer.down_bias, np.float32), stored[f"{prefix}mlp.down_proj.bias"])
    if config.qk_norm:
        np.testing.assert_array_equal(np.asarray(layer.k_norm, np.float32), stored[f"{prefix}self_attn.k_norm.weight"])


def test_float32_is_rounded_to_bfloat16_to_nearest(stories260k):
    rounded = as_float32(stories260k)["model.embed_tokens.weight"].astype(BFLOAT16)
    weights = load(stories260k, "bfloat16")
    np.testing.assert_array_equal(np.asarray(weights.embed), rounded)
    np.testing.assert_array_equal(np.asarray(head(weights)), rounded)


def test_rounded_to_gives_bfloat16_values_in_float32(stories260k):
    ours, halves = (load(stories260k, dtype, rounded_to=BFLOAT16) for dtype in (np.float32, BFLOAT16))
    for rounded, half in zip(jax.tree.leaves(ours), jax.tree.leaves(halves), strict=True):
        assert rounded.dtype == np.float32
        np.testing.assert_array_equal(rounded, np.asarray(half, np.float32))


@pytest.mark.parametrize("stored_dtype", [np.float16, np.float64, BFLOAT16], ids=str)
def test_stored_float_types(stories260k, tmp_path, stored_dtype):
    tensors = {name: array.astype(stored_dtype) for name, array in as_float32(stories260k).items()}
    weights = load(copy_model(stories260k, tmp_path / "model", tensors))
    expected = tensors["model.layers.0.self_attn.o_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(weights.layers[0].o, expected)


def test_shards_with_an_index(stories260k, tmp_path):
    tensors = as_float32(stories260k)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {
        name: shards[i % 2] for i, name in enumerate(tensors)
    }  # q, k and v of a layer lie in different shards
    for shard in shards:
        save_file({name: tensors[name] for name, where in weight_map.items() if where == shard}, tmp_path / shard)
    (tmp_path / "config.json").write_text((stories260k / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"left.over": np.zeros(1)}, tmp_path / "unrelated.safetensors")  # not in the index, so not read
    for ours, whole in zip(jax.tree.leaves(load(tmp_path)), jax.tree.leaves(load(stories260k)), strict=True):
        np.testing.assert_array_equal(ours, whole)

    (tmp_path / shards[1]).unlink()
    with pytest.raises(ModelError, match=shards[1]):
        open_checkpoint(str(tmp_path))


def test_every_misfit_is_named_at_once(stories260k, tmp_path):
    tensors = as_float32(stories260k)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.layers.9.input_layernorm.weight"] = np.zeros(64, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 172), np.float32)
    tensors["model.layers.3.mlp.down_proj.weight"] = np.zeros((64, 172), np.int8)
    placer = Recorder()
    with pytest.raises(ModelError) as error:
        load(copy_model(stories260k, tmp_path / "model", tensors), placer=placer)
    text = str(error.value)
    assert says(text, "missing … layers.1.self_attn.k_proj.weight, model.norm.weight")
    assert says(text, "no place … model.layers.0.self_attn.q_proj.bias, model.layers.9.input_layernorm.weight")
    assert says(text, "model.layers.2.mlp.up_proj.weight … [64, 172] … [172, 64]")
    assert "model.layers.3.mlp.down_proj.weight (I8)" in text
    assert not placer.placed  # nothing was read in vain


def test_harmless_surplus_is_ignored(stories260k, tmp_path):
    tensors = as_float32(stories260k)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = np.full((512, 64), 7, np.float32)  # the config says tied, and that decides
    weights = load(copy_model(stories260k, tmp_path / "model", tensors))
    np.testing.assert_array_equal(head(weights), tensors["model.embed_tokens.weight"])


def test_an_untied_head_must_be_there(stories260k, tmp_path):
    with pytest.raises(ModelError, match=r"missing .*: lm_head\.weight"):
        load(copy_model(stories260k, tmp_path / "model", as_float32(stories260k), tie_word_embeddings=False))


class Recorder(OneDevice):
    def __init__(self):
        self.placed = []

    def place(self, spec, arrays):
        self.placed.append((spec, *arrays))
        return arrays[0]


def test_the_placer_sees_each_spec_and_progress_ends_at_the_whole(stories260k):
    placer, reports = Recorder(), []
    weights = load(stories260k, placer=placer, report=lambda fraction, num_bytes: reports.append((fraction, num_bytes)))
    assert all(spec.shape == array.shape and array.dtype == np.float32 for spec, array in placer.placed)
    assert len(placer.placed) == len(jax.tree.leaves(weights))
    assert reports == sorted(reports)
    assert reports[-1] == (1.0, open_checkpoint(str(stories260k)).total_bytes)


class SecondOfTwo(OneDevice):
    """Reads the shards of the second of two tensor-parallel devices."""

    def shards(self, spec):
        return [shard_of(spec, Grid(tensor=2), 1)]


@pytest.mark.parametrize("model", ["stories260k", "stories260k-qwen2moe", "gpt_oss", "deepseek_v2"])
def test_a_shard_is_read_as_if_cut_from_the_whole(checkpoint: Callable[[str], Path], model):
    """Covers experts one by one and fused in one tensor, rows in parts, and reordered rows."""
    folder = checkpoint(model)
    whole, half = load(folder), load(folder, placer=SecondOfTwo())
    declared = declare(decoder_config(open_checkpoint(str(folder)).config), "float32")
    for spec, all_of_it, shard in zip(*map(jax.tree.leaves, (declared, whole, half)), strict=True):
        wanted = cut(np.asarray(all_of_it), shard_of(spec, Grid(tensor=2), 1))
        np.testing.assert_array_equal(np.asarray(shard), wanted, err_msg=str(spec))


def test_the_cpu_adopts_our_buffers_instead_of_copying():
    if jax.default_backend() != "cpu":
        pytest.skip("only a CPU can share memory with numpy")
    buffer = aligned_empty((3, 5), np.dtype(np.float32))
    assert OneDevice().place(None, [buffer]).unsafe_buffer_pointer() == buffer.ctypes.data


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_random_weights_fit_any_config(stories260k, dtype):
    checkpoint = open_checkpoint(str(stories260k), load_format="dummy")
    assert checkpoint.tensors == {}
    config = decoder_config(checkpoint.config)
    weights = random_weights(config, dtype, seed=3)
    assert_filled(weights, config, dtype)
    np.testing.assert_array_equal(weights.layers[2].attn_norm, np.ones(64))
    values = np.asarray(weights.embed, np.float32)
    assert abs(values.mean()) < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.03)
    assert np.linalg.matrix_rank(np.asarray(weights.layers[0].gate_up, np.float32)) == 64
    again, other = random_weights(config, dtype, seed=3), random_weights(config, dtype, seed=4)
    np.testing.assert_array_equal(weights.layers[1].qkv, again.layers[1].qkv)
    assert (np.asarray(weights.layers[1].qkv) != np.asarray(other.layers[1].qkv)).any()
