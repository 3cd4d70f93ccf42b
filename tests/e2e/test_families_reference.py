"""Families without a checkpoint of their own here give the tokens and logprobs of a plain second implementation."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import reference_bailing
import reference_qwen1
from exact import ALL_PROMPTS, GREEDY, Build, assert_oracle, assert_reference
from safetensors.numpy import load_file, save_file

from sgl_jax.models.model_errors import ModelError
from simulated import Client

PROMPT_LENGTHS = (1, 7, 33)
STEPS = 8

QWEN1 = reference_qwen1.CONFIG
MODELS: dict[str, tuple[ModuleType, dict]] = {
    "qwen1": (reference_qwen1, QWEN1),
    # The prompt of 33 tokens, and the end of the one of 7, exceed the trained length: logn scaling applies.
    "qwen1-logn": (reference_qwen1, QWEN1 | {"seq_length": 12, "use_dynamic_ntk": False, "rotary_pct": 0.25}),
    "bailing": (reference_bailing, reference_bailing.V1),
    "bailing-v2": (reference_bailing, reference_bailing.V2),
}


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.supports("float32 on a CPU", ["QWenLMHeadModel", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_and_logprobs_of_the_reference(build: Build, tmp_path: Path, name: str, page_size: int) -> None:
    reference, config = MODELS[name]
    tensors = reference.checkpoint(config, seed=7)
    core = build(write(tmp_path, config, tensors), bucket=ALL_PROMPTS, page_size=page_size, max_total_tokens=256)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
    assert_reference(core, prompts, functools.partial(reference.logprobs, tensors, config), STEPS)


def qwen2_as_qwen1(source: Path, folder: Path) -> Path:
    """Write a Qwen 2 checkpoint in the layout of Qwen 1, with KV heads repeated for each head of their group."""
    old = json.loads((source / "config.json").read_text())
    heads, kv_heads, hidden = old["num_attention_heads"], old["num_key_value_heads"], old["hidden_size"]
    stored = {name: value.astype(np.float32) for name, value in load_file(source / "model.safetensors").items()}

    def repeated(weight: np.ndarray) -> np.ndarray:
        by_head = weight.reshape(kv_heads, hidden // heads, -1)
        return np.repeat(by_head, heads // kv_heads, axis=0).reshape(hidden, *weight.shape[1:])

    tensors = {
        "transformer.wte.weight": stored["model.embed_tokens.weight"],
        "transformer.ln_f.weight": stored["model.norm.weight"],
        "lm_head.weight": stored["lm_head.weight"],
    }
    for i in range(old["num_hidden_layers"]):
        at, to = f"model.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (stored[f"{at}.self_attn.{part}_proj.{kind}"] for part in "qkv")
            tensors[f"{to}.attn.c_attn.{kind}"] = np.concatenate([q, repeated(k), repeated(v)])
        for new, name in {
            "ln_1": "input_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "ln_2": "post_attention_layernorm",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            tensors[f"{to}.{new}.weight"] = stored[f"{at}.{name}.weight"]
    config = QWEN1 | {
        "vocab_size": old["vocab_size"],
        "hidden_size": hidden,
        "num_hidden_layers": old["num_hidden_layers"],
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "intermediate_size": 2 * old["intermediate_size"],
        "layer_norm_epsilon": old["rms_norm_eps"],
        "rotary_emb_base": old["rope_theta"],
        "max_position_embeddings": old["max_position_embeddings"],
        "seq_length": old["max_position_embeddings"],
    }
    return write(folder, config, tensors)


def test_qwen2_laid_out_as_qwen1_gives_transformers_tokens_and_logprobs(
    build: Build, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen2")
    shutil.copy(source / "oracle.json", tmp_path)
    assert_oracle(build(qwen2_as_qwen1(source, tmp_path), bucket=ALL_PROMPTS, max_total_tokens=1024), tmp_path)


def test_a_family_of_a_package_is_served(
    build: Build, stories260k: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tale_family.py").write_text(
        """
import dataclasses

from sgl_jax.models import llama

ARCHITECTURES = ("TaleForCausalLM",)
NAMES = dataclasses.replace(llama.NAMES, embed="tale.words")


def config(hf):
    same = llama.config(hf | {"architectures": ["LlamaForCausalLM"]})
    return dataclasses.replace(same, architecture="TaleForCausalLM")
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((stories260k / "config.json").read_text()) | {"architectures": ["TaleForCausalLM"]}
    tensors = load_file(stories260k / "model.safetensors")
    tensors["tale.words"] = tensors.pop("model.embed_tokens.weight")
    folder = write(tmp_path, config, tensors)
    with pytest.raises(ModelError, match="TaleForCausalLM"):
        build(folder)
    core = build(folder, model_package="tale_family", bucket=ALL_PROMPTS)
    case = json.loads((golden / "stories260k.json").read_text())["cases"][0]
    client = Client(core)
    client.submit(0, case["prompt_ids"], max_tokens=8, **GREEDY)
    client.run()
    assert core.info.architecture == "TaleForCausalLM"
    assert client.tokens[0] == next(value for key, value in case.items() if key.startswith("output_ids"))[:8]
