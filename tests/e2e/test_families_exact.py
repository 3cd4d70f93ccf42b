"""Every family of models gives, in float32, the tokens and logprobs of Hugging Face transformers: prompts whole and in chunks,
alone and together. A family of each kind of attention has pages of 1 token, the others of 16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from exact import ALL_PROMPTS, Build, assert_oracle

import checkpoints
from sgl_jax.runtime import platform

FAMILIES = {  # folder -> architecture in its config.json
    "llama": "LlamaForCausalLM",
    "llama-attn-bias": "LlamaForCausalLM",
    "llama-rope3": "LlamaForCausalLM",
    "llama-tied": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2-tied": "Qwen2ForCausalLM",
    "qwen2-yarn": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-tied": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_moe-mixed": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe-air": "Glm4MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v2-lite": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v3-noqlora": "DeepseekV3ForCausalLM",
}
PAGES_OF_1 = {"llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v2-lite"}
SCANNED = ["gemma3_text", "smollm3", "gpt_oss", "qwen2_moe-mixed", "deepseek_v3"]


@pytest.mark.supports("float32 on a CPU", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_transformers_tokens_and_logprobs(
    build: Build, checkpoint: Callable[[str], Path], family: str
) -> None:
    folder = checkpoint(family)
    core = build(folder, bucket=ALL_PROMPTS, page_size=1 if family in PAGES_OF_1 else 16, max_total_tokens=1024)
    assert core.info.architecture == FAMILIES[family]
    assert_oracle(core, folder)


@pytest.mark.supports("layers scanned, as on a GPU", SCANNED)
@pytest.mark.parametrize("family", SCANNED)
def test_the_form_accelerators_get_gives_them(
    build: Build, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Layers are stacked in groups and scanned, and decoding rows computed side by side."""
    form = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=True, vectorises_rows=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", form)
    folder = checkpoint(family)
    assert_oracle(build(folder, bucket=ALL_PROMPTS, page_size=1, max_total_tokens=1024), folder)


def test_every_folder_is_tried() -> None:
    assert sorted(FAMILIES) == sorted(folder.name for folder in (checkpoints.DATA / "oracle").iterdir())
