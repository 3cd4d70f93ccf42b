"""The families we serve: Hugging Face architecture name -> the module that reads its config and names its tensors."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

from sgl_jax.models import (
    bailing,
    deepseek,
    gemma,
    glm4_moe,
    gpt_oss,
    grok,
    llama,
    mixtral,
    qwen1,
    qwen2,
    qwen3,
    qwen_moe,
)
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.hf_config import eos_token_ids
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.names import TensorNames
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.weight_plan import plan_weights

FAMILIES: dict[str, ModuleType] = {
    architecture: module
    for module in (llama, qwen1, qwen2, qwen3, qwen_moe, mixtral, gemma, glm4_moe, bailing, gpt_oss, grok, deepseek)
    for architecture in module.ARCHITECTURES
}


GROUP = "sgl_jax.models"  # entry points of installed packages: architecture = module


def add_package(name: str) -> None:
    """Serve the families of a module, or of the modules it names in FAMILIES; they come before ours of the same name.

    A family's module is as those in this folder: ARCHITECTURES, NAMES and config. Raises ModelError.
    """
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"--model-package {name} cannot be imported ({error}); is it on the Python path?") from error
    for module in getattr(package, "FAMILIES", (package,)):
        for architecture in _checked(module).ARCHITECTURES:
            FAMILIES[architecture] = module


def decoder_config(
    hf: Mapping[str, object],
    generation_config: Mapping[str, object] | None = None,
    tensors: Mapping[str, StoredTensor] | None = None,
) -> DecoderConfig:
    """Translates config.json. End-of-sequence ids come from generation_config.json where it has them. With a
    checkpoint's `tensors` an unknown architecture's relatives are named."""
    hf, generation_config = RawConfig(hf), RawConfig(generation_config or {})
    architectures = hf.get("architectures") or []
    known = [a for a in architectures if a in FAMILIES or _from_entry_point(a)]
    if not known:
        raise ModelError(
            f"config.json names the architecture {', '.join(architectures) or '(none)'} "
            f"(model_type {hf.get('model_type')!r}); supported are {', '.join(sorted(FAMILIES))}{_relatives(hf, tensors)}"
        )
    config = _translated(known[0], hf)
    eos = tuple(token for token in eos_token_ids(generation_config) or config.eos_token_ids if token >= 0)
    if family_eos := getattr(FAMILIES[known[0]], "eos_token_ids", None):
        more = (token for token in family_eos(generation_config) if token < config.vocab_size)
        eos = tuple(dict.fromkeys((*eos, *more)))
    if any(token >= config.vocab_size for token in eos):
        raise ModelError(f"eos_token_id is {list(eos)}, but the vocabulary has the ids 0 to {config.vocab_size - 1}")
    return dataclasses.replace(config, eos_token_ids=eos)


def _translated(architecture: str, hf: RawConfig) -> DecoderConfig:
    module = FAMILIES[architecture]
    defaults = getattr(module, "DEFAULTS", {}).get(architecture, {})
    return module.config(defaults | hf | {"architectures": [architecture]})


def tensor_names(config: DecoderConfig) -> TensorNames:
    return FAMILIES[config.architecture].NAMES


def _checked(module: Any) -> ModuleType:
    for needed in ("ARCHITECTURES", "NAMES", "config"):
        if not hasattr(module, needed):
            raise ModelError(f"{module.__name__} is no model family: it has no {needed} (docs/features/add_a_model.md)")
    return module


def _from_entry_point(architecture: str) -> bool:
    for point in metadata.entry_points(group=GROUP, name=architecture):
        FAMILIES[architecture] = _checked(point.load())
    return architecture in FAMILIES


def _relatives(hf: RawConfig, tensors: Mapping[str, StoredTensor] | None) -> str:
    """Which families the checkpoint would fit if config.json named them."""
    if not tensors:
        return ""
    fitting = []
    for architecture, module in FAMILIES.items():
        try:
            plan_weights(tensors, _translated(architecture, hf), "float32", module.NAMES, source="")
        except (
            ModelError,
            ArithmeticError,
            LookupError,
            TypeError,
        ):  # a config that means something else can do anything
            continue
        fitting.append(architecture)
    if not fitting:
        return ". Its tensors have the names and shapes of none of them"
    return (
        f". Its tensors have the names and shapes of {' and '.join(fitting)}: if it computes the same, "
        "write that into architectures in config.json"
    )
