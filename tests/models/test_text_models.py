"""The text model of a model that also sees is the same model as when it is saved by itself.

transformers 5.19 answers such folders (made with a small vision part) with the tokens of oracle/*/oracle.json.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import Weights

INSIDE, BESIDE = "language_model.model.", "model.language_model."
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
MROPE_3 = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
# class, model_type, text_config.model_type (None: the text's keys lie beside the others), checkpoint of the text alone,
# prefix of its tensors, what text_config says besides
WHOLES = [
    ("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", "gemma3_text", INSIDE, {}),
    ("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", "gemma3_text", BESIDE, {}),
    ("Mistral3ForConditionalGeneration", "mistral3", "mistral", "mistral", INSIDE, {}),
    ("LlavaForConditionalGeneration", "llava", "llama", "llama", INSIDE, {}),
    ("LlavaNextForConditionalGeneration", "llava_next", "mistral", "mistral", INSIDE, {}),
    ("LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2", "qwen2", INSIDE, {}),
    ("InternVLForConditionalGeneration", "internvl", "qwen2", "qwen2", INSIDE, {}),
    ("SmolVLMForConditionalGeneration", "smolvlm", "llama", "llama", "model.text_model.", {}),
    ("Idefics3ForConditionalGeneration", "idefics3", "llama", "llama", "model.text_model.", {}),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", None, "qwen2", "model.", {"rope_scaling": MROPE}),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen2-tied",
        BESIDE,
        {"rope_scaling": MROPE},
    ),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3_vl_text", "qwen3", BESIDE, {"rope_scaling": MROPE_3}),
]


def write_whole(source: Path, folder: Path, whole: str, kind: str, text: str | None, prefix: str, extra: Any) -> None:
    """Write the checkpoint `source` as the text model of a larger one, with a tensor of a vision part beside it."""
    shutil.copytree(source, folder)
    alone = json.loads((source / "config.json").read_text()) | extra
    tied = {key: alone[key] for key in ("tie_word_embeddings",) if key in alone}
    inner = {key: value for key, value in alone.items() if key not in ("architectures", *tied)}
    outer = {"architectures": [whole], "model_type": kind, "vision_config": {"hidden_size": 8}} | tied
    config = inner | outer if text is None else outer | {"text_config": inner | {"model_type": text}}
    (folder / "config.json").write_text(json.dumps(config))
    head = "language_model.lm_head.weight" if prefix == INSIDE else "lm_head.weight"
    tensors = {
        head if name == "lm_head.weight" else prefix + name.removeprefix("model."): array
        for name, array in load_file(source / "model.safetensors").items()
    }
    vision = {
        "visual.blocks.0.norm1.weight": np.zeros(3),
        "model.vision_tower.layers.0.input_layernorm.weight": np.ones(3),
    }
    save_file(tensors | vision, folder / "model.safetensors")


def load(folder: Path) -> tuple[DecoderConfig, Weights[jax.Array]]:
    found = open_checkpoint(str(folder))
    assert found.dtype == "bfloat16"
    config = decoder_config(found.config, found.generation_config, found.tensors)
    return config, load_weights(found, config, "float32")


@pytest.mark.parametrize(("whole", "kind", "text", "alone", "prefix", "extra"), WHOLES)
@pytest.mark.parametrize("named", ["by its class", "by model_type", "as the text model"])
def test_a_text_model_inside_another_is_the_model_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path, whole, kind, text, alone, prefix, extra, named
) -> None:
    folder = tmp_path / "whole"
    write_whole(checkpoint(alone), folder, whole, kind, text, prefix, extra)
    (wanted_config, wanted), config = load(checkpoint(alone)), json.loads((folder / "config.json").read_text())
    if named == "by model_type" or (named == "as the text model" and text is not None):
        architectures = None if named == "by model_type" else [wanted_config.architecture]
        (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    got_config, got = load(folder)
    assert got_config == dataclasses.replace(wanted_config, part_of=whole)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, wanted)))


def test_what_published_text_configs_leave_out() -> None:
    """Values of google/gemma-3-4b-it, llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf."""
    gemma = {
        **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34},
        **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    }
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": gemma}
    config = decoder_config(whole)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.window(0), config.window(5), config.eos_token_ids, config.tie_embeddings) == (
        1024,
        None,
        (1, 106),
        True,
    )
    vicuna = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    config = decoder_config({"architectures": ["LlavaForConditionalGeneration"], "text_config": vicuna})
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size) == (
        4096,
        11008,
        32,
        32064,
    )
    mistral = {"model_type": "mistral", "max_position_embeddings": 32768, "vocab_size": 32064, "sliding_window": None}
    config = decoder_config({"architectures": ["LlavaNextForConditionalGeneration"], "text_config": mistral})
    assert (config.intermediate_size, config.num_kv_heads, config.sliding_windows) == (14336, 8, None)


def test_a_text_model_that_is_not_served_is_named() -> None:
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "ministral3"}}
    with pytest.raises(ModelError, match=r"text_config\.model_type is 'ministral3'.* MistralForCausalLM, "):
        decoder_config(whole)


@pytest.mark.parametrize("name", ["Llama4ForConditionalGeneration", "MllamaForConditionalGeneration"])
def test_a_model_that_is_not_served_is_told_which_are(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} .*LlamaForCausalLM.* the text of Gemma3ForConditionalGeneration, "):
        decoder_config({"architectures": [name], "model_type": "llama4", "text_config": {}})


def test_the_format_of_a_text_model_is_that_of_the_whole(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    write_whole(checkpoint("llama"), tmp_path / "whole", *WHOLES[3][:3], INSIDE, {})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    found = decoder_config(config | {"quantization_config": {"quant_method": "awq"}}).weight_format
    assert found is not None
    assert found.form.kind == "groups"
