"""Rules of holding: what a checkpoint's format, --quantization and the platform make of a model's matrices."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import pytest

import checkpoints
from quantise import compressed
from sgl_jax.engine.quantisation import held, say_weights
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.quantised import Quantised
from sgl_jax.models.weights import declare
from sgl_jax.observability import log
from sgl_jax.planning.fit import make_plan
from sgl_jax.planning.model import PlannedModel
from sgl_jax.planning.target import find_target
from sgl_jax.runtime.placed_weights import weight_bytes
from sgl_jax.runtime.platform import PLATFORMS
from sgl_jax.settings.server_args import ServerArgs

LLAMA = json.loads((checkpoints.DATA / "quant" / "ct-fp8-static-llama" / "config.json").read_text())
W8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": compressed(W8, "int-quantized", input_activations={"num_bits": 8, "type": "int"}),
    "w8a16": compressed(W8, "int-quantized"),
    "fp8": {"quant_method": "fp8"},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "awq": {"quant_method": "awq"},
    "groups of 96": {"quant_method": "awq", "group_size": 96},
    "act-order": {"quant_method": "gptq", "bits": 4, "desc_act": True},
    "static groups": {"quant_method": "gptq", "bits": 4, "desc_act": True, "static_groups": True},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}
DEVICES = {
    "cpu": ("cpu", "cpu"),
    "v6e": ("tpu", "TPU v6 lite"),
    "v7x": ("tpu", "TPU7x core"),
    "gpu": ("gpu", "NVIDIA H100"),
}
INT8, FP8, W8A8 = "int8 by output", "float8_e4m3fn by output", "int8 by output, tokens rounded to int8"
FP8_FP8 = f"{FP8}, tokens rounded to float8_e4m3fn"
INT4, FP8_BLOCKS = "int4 in groups of 128", "float8_e4m3fn in groups of 128"
AWQ = f"{INT4} with offsets"


def model(said: dict[str, Any] | None) -> DecoderConfig:
    return decoder_config(
        {key: value for key, value in LLAMA.items() if key != "quantization_config"} | {"quantization_config": said}
    )


def scheme(said: dict[str, Any] | None, device: str, option: str | None = None) -> str:
    name, kind = DEVICES[device]
    args = ServerArgs(model_path="m", quantization=option)
    return str(held(args, model(said), PLATFORMS[name], kind).weight_scheme or "floats")


@pytest.mark.parametrize(
    ("said", "schemes"),
    [
        ("w8a8", (W8A8, INT8, INT8, INT8)),
        ("w8a16", (INT8, INT8, INT8, INT8)),
        ("fp8", ("floats", FP8, FP8_FP8, FP8)),
        ("fp8 blocks", ("floats", FP8_BLOCKS, FP8_BLOCKS, INT8)),
        ("awq", ("floats", AWQ, AWQ, INT8)),
        ("groups of 96", ("floats", INT8, INT8, INT8)),
        ("act-order", ("floats", INT8, INT8, INT8)),
        ("static groups", ("floats", INT4, INT4, INT8)),
        ("nvfp4", ("floats", INT8, INT8, INT8)),
    ],
)
def test_by_the_checkpoint_s_format(said: str, schemes: tuple[str, ...]) -> None:
    assert tuple(scheme(FORMATS[said], device) for device in DEVICES) == schemes


@pytest.mark.parametrize(
    ("option", "schemes"),
    [
        ("int8", (W8A8, W8A8, W8A8, W8A8)),
        ("w8a8_int8", (W8A8, W8A8, W8A8, W8A8)),
        ("int8-weight-only", (INT8, INT8, INT8, INT8)),
        ("fp8", (None, FP8, FP8_FP8, FP8)),
        ("w8a8_fp8", (None, FP8, FP8_FP8, FP8)),
        ("fp8-weight-only", (None, FP8, FP8, FP8)),
        ("int4", (None, INT4, INT4, None)),
        ("auto", (W8A8, INT8, FP8_FP8, INT8)),
    ],
)
def test_plain_weights_by_the_flag(option: str, schemes: tuple[str | None, ...]) -> None:
    for device, wanted in zip(DEVICES, schemes, strict=True):
        if wanted is None:
            with pytest.raises(ValueError, match=rf"--quantization is {option}; .*{DEVICES[device][0]}.* give int8"):
                scheme(None, device, option)
        else:
            assert scheme(None, device, option) == wanted


@pytest.mark.parametrize(
    ("said", "option", "wanted"),
    [
        ("fp8", "fp8", FP8_FP8),
        ("fp8 blocks", "fp8", FP8_BLOCKS),
        ("fp8", "modelopt", None),
        ("awq", "awq_marlin", AWQ),
        ("awq", "gptq", None),
        ("awq", "auto", AWQ),
        ("awq", "fp8-weight-only", FP8),  # rounded again
        ("w8a8", "w8a8_int8", INT8),
        ("w8a8", "compressed-tensors", INT8),
        ("nvfp4", "modelopt_fp4", INT8),
        (None, "awq", None),
    ],
)
def test_a_name_that_repeats_the_format_must_be_true(said: str | None, option: str, wanted: str | None) -> None:
    stored = FORMATS[said] if said else None
    if wanted is not None:
        assert scheme(stored, "v7x", option) == wanted
        return
    about = "m is stored as" if said else "m is not quantised"
    with pytest.raises(ValueError, match=rf"--quantization is {option}; {about}.* leave it out"):
        scheme(stored, "v7x", option)


def test_matrices_that_the_checkpoint_leaves_wide_stay_so() -> None:
    """In one layer, by its list; layers of unlike weights are not stacked together."""
    left = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.mlp.down_proj", "lm_head"]}
    config = held(ServerArgs(model_path="m"), model(left), PLATFORMS["tpu"], "TPU v6 lite")
    assert config.layer_groups() == (1, 1)
    first, second = declare(config, "bfloat16").layers
    assert [isinstance(layer.down, Quantised) for layer in (first, second)] == [True, False]
    assert isinstance(second.qkv, Quantised)
    assert not isinstance(declare(config, "bfloat16").lm_head, Quantised)
    assert dataclasses.replace(config, weight_scheme=None).layer_groups() == (2,)


def test_a_head_that_is_stored_quantised_is_held_so() -> None:
    config = held(ServerArgs(model_path="m"), model(FORMATS["w8a16"] | {"ignore": []}), PLATFORMS["tpu"], "TPU v6 lite")
    assert isinstance(declare(config, "bfloat16").lm_head, Quantised)
    config = held(ServerArgs(model_path="m"), model(FORMATS["fp8"]), PLATFORMS["tpu"], "TPU v6 lite")
    assert not isinstance(declare(config, "bfloat16").lm_head, Quantised)  # until a tensor tells


def test_cpus_hold_the_head_as_int8_and_a_tied_one_beside_its_embedding(caplog: pytest.LogCaptureFixture) -> None:
    for tied in (False, True):
        plain = dataclasses.replace(model(None), tie_embeddings=tied)
        for device, option in (("cpu", "int8"), ("cpu", "auto"), ("cpu", "int8-weight-only"), ("v6e", "int8")):
            config = held(ServerArgs(model_path="m", quantization=option), plain, PLATFORMS[DEVICES[device][0]], device)
            declared, has_head = declare(config, "bfloat16"), device == "cpu" and option != "int8-weight-only"
            assert isinstance(declared.lm_head, Quantised) == has_head
            assert (declared.lm_head is None) == (tied and not has_head)
            assert not isinstance(declared.embed, Quantised)
    tied = held(ServerArgs(model_path="m", quantization="int8"), plain, PLATFORMS["cpu"], "cpu")
    saved = weight_bytes(plain, "bfloat16") - weight_bytes(tied, "bfloat16")
    with caplog.at_level(logging.INFO, "sgl_jax"):
        say_weights(tied, tied, "bfloat16")
    assert f"{log.size(saved)} less than in bfloat16" in caplog.text


def test_the_log_says_how_matrices_are_stored_and_held(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint(str(checkpoints.DATA / "quant" / "awq-g128-qwen3_moe"))
    config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
    with caplog.at_level(logging.INFO, "sgl_jax"):
        config = held(ServerArgs(model_path="m"), config, PLATFORMS["tpu"], "TPU v6 lite")
        say_weights(config, config, "bfloat16")
        plain = held(ServerArgs(model_path="m", quantization="int4"), model(None), PLATFORMS["tpu"], "TPU v6 lite")
        say_weights(plain, plain, "bfloat16")
        say_weights(model(None), model(None), "bfloat16")
    stored, warned, rounded = caplog.messages
    assert "stored as awq, 4 bits in groups of 128 are held as int4 in groups of 128 with offsets:" in stored
    assert "less than in bfloat16" in stored
    assert "embeddings, norms" in stored
    assert "as the checkpoint has them, moe.router (2 times), lm_head" in stored
    assert "--quantization int4" in warned
    assert ".24 to .43 nats" in warned
    assert "Matrices are held as int4 in groups of 128, rounded" in rounded


def test_groups_that_devices_would_cut_are_rounded_again() -> None:
    args = ServerArgs(model_path="m", tp_size=4)  # a quarter of the inputs of `down` is no whole group
    config = held(args, model(FORMATS["awq"]), PLATFORMS["tpu"], "TPU v6 lite")
    assert str(config.weight_scheme) == INT8


def test_a_plan_counts_bytes_as_they_are_held() -> None:
    target, bytes_of = find_target("v6e-1"), {}
    for option in (None, "int8-weight-only"):
        args = ServerArgs(model_path="m", quantization=option)
        planned = PlannedModel(model(None), "bfloat16", "m")
        bytes_of[option] = make_plan(args, planned, target, 64).launch.weight_bytes
    embeddings = 2 * 2 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert 0.5 < (bytes_of["int8-weight-only"] - embeddings) / (bytes_of[None] - embeddings) < 0.53
