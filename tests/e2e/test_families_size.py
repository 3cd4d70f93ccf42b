"""Tests of program size: with scanned layers a model twelve times as deep makes a program of the same size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import reference_bailing
import reference_grok
import reference_qwen1
from layer_depth import DEPTHS, at_depth, step_program

FOLDERS = {
    **{"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral"},
    **{"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"},
    **{"Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe"},
    **{"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"},
    **{"GemmaForCausalLM": "gemma", "GraniteForCausalLM": "granite", "Phi3ForCausalLM": "phi3"},
    **{"SeedOssForCausalLM": "seed_oss", "SmolLM3ForCausalLM": "smollm3"},
    **{"Glm4MoeForCausalLM": "glm4_moe", "GptOssForCausalLM": "gpt_oss"},
    **{"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"},
}
CONFIGS = {
    "QWenLMHeadModel": reference_qwen1.CONFIG,
    "Grok1ForCausalLM": reference_grok.CONFIG,
    "BailingMoeForCausalLM": reference_bailing.V1,
    "BailingMoeV2ForCausalLM": reference_bailing.V2,
}


@pytest.mark.supports("48 layers make the program of 4", FOLDERS)
@pytest.mark.supports("48 layers make the program of 4", CONFIGS)
@pytest.mark.parametrize("architecture", [*FOLDERS, *CONFIGS])
def test_48_layers_make_the_program_of_4(checkpoint: Callable[[str], Path], architecture: str) -> None:
    config = CONFIGS.get(architecture)
    if config is None:
        folder = checkpoint(FOLDERS[architecture])
        config = json.loads((folder / "config.json").read_text())
    shallow, deep = (
        len(program.function.lower(*program.args).as_text())
        for program in (step_program(at_depth(config, layers)) for layers in DEPTHS)
    )
    assert shallow < deep < 1.3 * shallow
