"""GPT-OSS's experts, stored together in bfloat16 or MXFP4, become the same weights as any other family's."""

from __future__ import annotations

import dataclasses
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
from sgl_jax.models.formats.floats import mxfp4
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from shards import in_memory

LAYER = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def gpt_oss(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("gpt_oss")


def load(path: Path, dtype: str = "float32"):
    checkpoint = open_checkpoint(str(path))
    return load_weights(checkpoint, decoder_config(checkpoint.config), dtype)


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def e2m1(code: int) -> float:
    """Decode OCP MX 1.0, section 5.3.3: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa * 0.5)
    return -magnitude if sign else magnitude


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Read one expert's matrix."""
    stored = {"w_blocks": in_memory("b", blocks[None]), "w_scales": in_memory("s", scales[None])}
    stored = {name: dataclasses.replace(tensor, dtype="U8") for name, tensor in stored.items()}
    return mxfp4(RawConfig()).view(stored)["w"].read()[0]


def test_mxfp4_values_are_e2m1_times_a_power_of_two() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 2, 16), np.uint8)
    scales = np.array([[0, 127], [120, 130], [250, 1]], np.uint8)
    expected = [
        [e2m1(code) * 2.0 ** (int(scales[r, b]) - 127) for b in range(2) for byte in blocks[r, b] for code in (byte & 15, byte >> 4)]
        for r in range(3)
    ]  # fmt: skip
    np.testing.assert_array_equal(dequantize(blocks, scales), np.array(expected, np.float32))
    assert np.isnan(dequantize(blocks[:1, :1], np.full((1, 1), 255, np.uint8))).all()


def test_experts_are_turned_and_their_gate_rows_come_first(gpt_oss: Path) -> None:
    stored, experts = load_file(gpt_oss / "model.safetensors"), load(gpt_oss).layers[1].moe.experts
    for e in (0, 7):
        gate_up, bias = (stored[LAYER + n][e].astype(np.float32) for n in ("gate_up_proj", "gate_up_proj_bias"))
        np.testing.assert_array_equal(experts.gate_up[e][:64], gate_up[:, 0::2].T)
        np.testing.assert_array_equal(experts.gate_up[e][64:], gate_up[:, 1::2].T)
        np.testing.assert_array_equal(experts.gate_up_bias[e], np.concatenate([bias[0::2], bias[1::2]]))
        np.testing.assert_array_equal(experts.down[e], stored[LAYER + "down_proj"][e].astype(np.float32).T)
    np.testing.assert_array_equal(experts.down_bias, stored[LAYER + "down_proj_bias"].astype(np.float32))


@pytest.mark.supports("stored quantised, dequantised while loading", {"gpt_oss": ["MXFP4"]})
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_loads_as_the_bfloat16_checkpoint_of_the_same_values(gpt_oss: Path, tmp_path: Path, dtype: str) -> None:
    """The published layout is blocks u8[E, out, in / 32, 16] and scales u8[E, out, in / 32], not transposed."""
    config = json.loads((gpt_oss / "config.json").read_text())
    rng, packed, plain = np.random.default_rng(0), {}, {}
    for name, array in load_file(gpt_oss / "model.safetensors").items():
        if not name.endswith("_proj") or "experts" not in name:
            packed[name] = plain[name] = array
            continue
        experts, columns, rows = array.shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = rng.integers(115, 125, blocks.shape[:-1], np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(experts, rows, columns // 32, 32)
        values = np.vectorize(e2m1)(codes) * 2.0 ** (scales.astype(int) - 127)[..., None]
        plain[name] = values.reshape(experts, rows, columns).swapaxes(1, 2).astype(ml_dtypes.bfloat16).copy()
    quantised = config | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    ours = load(write(tmp_path / "mxfp4", quantised, packed), dtype)
    whole = load(write(tmp_path / "plain", config, plain), dtype)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_misfits_are_told_with_both_shapes(gpt_oss: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt_oss / "model.safetensors")
    tensors[LAYER + "down_proj"] = np.zeros((8, 64, 32), np.float32)
    tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"] = np.zeros((8, 128, 2, 16), np.uint8)
    tensors["model.layers.2.mlp.experts.down_proj_blocks"] = np.zeros((8, 64, 2, 8), np.uint8)
    tensors["model.layers.2.mlp.experts.down_proj_scales"] = np.zeros((8, 64, 2), np.uint8)
    del tensors["model.layers.2.mlp.experts.down_proj"]
    config = json.loads((gpt_oss / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(ModelError) as error:
        load(write(tmp_path / "model", config, tensors))
    text = str(error.value)
    assert says(text, f"{LAYER}down_proj … [8, 32, 64] … [8, 64, 64]")
    assert says(text, ": model.layers.0.mlp.experts.gate_up_proj_blocks")  # without its scales
    assert says(text, "down_proj_blocks (U8: … down_proj_scales … [8, 64, 2] … 1 x 32 … [8, 64, 1]")


def test_config(gpt_oss: Path) -> None:
    hf = json.loads((gpt_oss / "config.json").read_text())
    config = decoder_config(hf)
    assert (config.activation, config.gate_limit, config.attn_sinks) == ("swiglu_oai", 7.0, True)
    assert (config.qkv_bias, config.o_bias, config.head_dim, config.rms_norm_eps) == (True, True, 16, 1e-5)
    assert config.sliding_windows == (16, None, 16, None)
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.experts_per_token, config.moe.bias, config.moe.router_bias) == (
        8,
        4,
        True,
        True,
    )
    assert decoder_config(hf | {"layer_types": None}).sliding_windows == (16, None, 16, None)
    assert decoder_config(hf | {"swiglu_limit": 5.0}).gate_limit == 5.0
