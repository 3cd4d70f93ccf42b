"""The families we serve: Hugging Face architecture name -> the module that reads its config and names its tensors."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from sgl_jax.models import deepseek, gemma, glm4_moe, gpt_oss, grok, llama, mixtral, qwen2, qwen3, qwen_moe
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.errors import ModelError
from sgl_jax.models.hf_config import eos_token_ids
from sgl_jax.models.names import TensorNames

FAMILIES: dict[str, ModuleType] = {
    architecture: module
    for module in (llama, qwen2, qwen3, qwen_moe, mixtral, gemma, glm4_moe, gpt_oss, grok, deepseek)
    for architecture in module.ARCHITECTURES
}


def decoder_config(hf: dict[str, Any], generation_config: dict[str, Any] | None = None) -> DecoderConfig:
    """Translates config.json. End-of-sequence ids come from generation_config.json where it has them."""
    architectures = hf.get("architectures") or []
    known = [a for a in architectures if a in FAMILIES]
    if not known:
        raise ModelError(
            f"config.json names the architecture {', '.join(architectures) or '(none)'} "
            f"(model_type {hf.get('model_type')!r}); supported are {', '.join(sorted(FAMILIES))}"
        )
    config = FAMILIES[known[0]].config({**hf, "architectures": known})
    eos = tuple(token for token in eos_token_ids(generation_config or {}) or config.eos_token_ids if token >= 0)
    if any(token >= config.vocab_size for token in eos):
        raise ModelError(f"eos_token_id is {list(eos)}, but the vocabulary has the ids 0 to {config.vocab_size - 1}")
    return dataclasses.replace(config, eos_token_ids=eos)


def tensor_names(config: DecoderConfig) -> TensorNames:
    return FAMILIES[config.architecture].NAMES
