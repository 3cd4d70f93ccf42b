"""Every family of models gives, in float32, the tokens and logprobs of Hugging Face transformers: at page sizes 1 and 16,
prompts whole and in chunks, alone and together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from exact import ALL_PROMPTS, Build, assert_oracle

from sgl_jax.runtime import platform

FAMILIES = [
    "llama",
    "llama-attn-bias",
    "llama-rope3",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen2-yarn",
    "qwen3",
    "qwen3-tied",
    "qwen2_moe",
    "qwen2_moe-mixed",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "glm4_moe-air",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2-lite",
    "deepseek_v3",
    "deepseek_v3-noqlora",
]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_transformers_tokens_and_logprobs(
    build: Build, shared_data: Path, family: str, page_size: int
) -> None:
    folder = shared_data / "oracle" / family
    assert_oracle(build(folder, bucket=ALL_PROMPTS, page_size=page_size, max_total_tokens=1024), folder)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen2_moe-mixed", "deepseek_v3"])
def test_the_form_accelerators_get_gives_them(
    build: Build, shared_data: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Layers stacked in groups and scanned, decoding rows side by side."""
    form = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=True, vectorises_rows=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", form)
    folder = shared_data / "oracle" / family
    assert_oracle(build(folder, bucket=ALL_PROMPTS, page_size=1, max_total_tokens=1024), folder)


def test_every_folder_is_tried(shared_data: Path) -> None:
    assert sorted(FAMILIES) == sorted(folder.name for folder in (shared_data / "oracle").iterdir())
