"""Table of the families we serve: by architecture, the module that reads its config and names its tensors."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from types import MappingProxyType, ModuleType

from sgl_jax.models import (
    bailing,
    deepseek,
    gemma,
    glm4_moe,
    gpt_oss,
    grok,
    llama,
    llama_like,
    mixtral,
    phi3,
    qwen1,
    qwen2,
    qwen3,
    qwen_moe,
)
from sgl_jax.models.architecture import CLASSIFIER, WHOLES, architecture_of_type, text_model
from sgl_jax.models.config_fields import check_fields
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.formats.find import weight_format
from sgl_jax.models.hf_config import eos_token_ids
from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.names import TensorNames
from sgl_jax.models.plan import plan_weights, wide_weights
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.stored_names import has_own_head

type Families = Mapping[str, ModuleType]  # by architecture


def _by_architecture(modules: Iterable[ModuleType]) -> Families:
    return MappingProxyType({architecture: module for module in modules for architecture in module.ARCHITECTURES})


_DENSE = (llama, llama_like, phi3, qwen1, qwen2, qwen3, gemma)
_OF_EXPERTS = (qwen_moe, mixtral, glm4_moe, bailing, gpt_oss, grok, deepseek)
FAMILIES = _by_architecture((*_DENSE, *_OF_EXPERTS))
_NO_TEXT = ("Model", CLASSIFIER)  # endings of classes that make vectors or logits of labels
GROUP = "sgl_jax.models"  # entry points of installed packages: architecture = module


def known_families(package: str | None) -> Families:
    """Return our families and those of the module that --model-package names, which replace ours of the same
    architecture.

    A family is a module with ARCHITECTURES, NAMES and config, like those in this folder. The named module is one, or
    lists several in FAMILIES. Raises ModelError if it cannot be imported or lacks one of these names.
    """
    if package is None:
        return FAMILIES
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ModelError(f"--model-package {package} cannot be imported ({error}); is it on Python's path?") from error
    added = map(_checked, getattr(module, "FAMILIES", (module,)))
    return MappingProxyType({**FAMILIES, **_by_architecture(added)})


def decoder_config(
    hf: Mapping[str, object],
    generation_config: Mapping[str, object] | None = None,
    tensors: Mapping[str, StoredTensor] | None = None,
    families: Families = FAMILIES,
) -> DecoderConfig:
    """Translate config.json. End-of-sequence ids are those of config.json and those of generation_config.json.

    Of a model that also sees or hears, the text model is described. A head that is stored with values of its own counts,
    even if the config calls it tied, as in transformers 5. Raises ModelError for an unknown architecture; the error names
    the families that the checkpoint's `tensors` would fit.
    """
    hf, generation_config = RawConfig(hf), RawConfig(generation_config or {})
    check_fields({key: hf.get(key) for key in ("architectures", "model_type", "text_config")})
    architecture = whole = _architecture(hf, families)
    if whole in WHOLES:
        architecture, hf = text_model(hf, whole, families)
    family = _find(architecture, families) if architecture else None
    if architecture is None or family is None:
        raise ModelError(
            f"config.json names the architecture {', '.join(hf.get('architectures') or ()) or '(none)'} "
            f"(model_type {hf.get('model_type')!r}); supported are {', '.join(sorted(families))}, and the text of "
            f"{', '.join(WHOLES)}{_relatives(hf, tensors, families)}"
        )
    check_fields(hf)
    with faults_named("config.json", f"{architecture} cannot be made of it"):
        config = _translated(architecture, family, hf)
    config = dataclasses.replace(config, part_of=whole if whole in WHOLES else None)
    if tensors and config.tie_embeddings and has_own_head(tensors, config, family.NAMES):
        config = dataclasses.replace(config, tie_embeddings=False)
    if config.weight_format is not None:
        config = dataclasses.replace(config, wide=wide_weights(tensors, config, family.NAMES))
    named = [token for token in (*eos_token_ids(generation_config), *config.eos_token_ids) if token >= 0]
    family_eos = family.eos_token_ids(generation_config) if hasattr(family, "eos_token_ids") else ()
    eos = tuple(dict.fromkeys(token for token in (*named, *family_eos) if token < config.vocab_size))
    if named and not eos:
        raise ModelError(f"eos_token_id is {named}, but the vocabulary has the ids 0 to {config.vocab_size - 1}")
    return dataclasses.replace(config, eos_token_ids=eos)


def tensor_names(config: DecoderConfig, families: Families = FAMILIES) -> TensorNames:
    """Return the tensor names of a config's family. `families` are those with which the config was made."""
    family = _find(config.architecture, families)
    if family is None:
        raise ModelError(f"{config.architecture} is none of {', '.join(sorted(families))}")
    return family.NAMES


def _architecture(hf: RawConfig, families: Families) -> str | None:
    """Return the first of `architectures` that is served, alone or for its text. It follows from model_type where none is
    given, only a class without a head or with labels, or the class of a text model whose config lies in a larger one's."""
    names = hf.get("architectures") or []
    found = next((name for name in names if name in WHOLES or _find(name, families)), None)
    inside = hf.get("text_config") and hf.get("hidden_size") is None
    if inside or (found is None and all(name.endswith(_NO_TEXT) for name in names)):
        return architecture_of_type(hf.get("model_type") or "", (*WHOLES, *families)) or found
    return found


def _find(architecture: str, families: Families) -> ModuleType | None:
    """Return the family of an architecture, from `families` or else from the entry points of installed packages."""
    found = families.get(architecture)
    if found is None:
        for point in metadata.entry_points(group=GROUP, name=architecture):
            found = _checked(point.load())
    return found


def _checked(module: ModuleType) -> ModuleType:
    for needed in ("ARCHITECTURES", "NAMES", "config"):
        if not hasattr(module, needed):
            raise ModelError(f"{module.__name__} is no model family: it has no {needed} (docs/features/add_a_model.md)")
    return module


def _translated(architecture: str, family: ModuleType, hf: RawConfig) -> DecoderConfig:
    defaults = getattr(family, "DEFAULTS", {}).get(architecture, {})
    config = family.config(defaults | hf | {"architectures": [architecture]})
    return dataclasses.replace(config, weight_format=weight_format(hf))


def _relatives(hf: RawConfig, tensors: Mapping[str, StoredTensor] | None, families: Families) -> str:
    """Say which families the checkpoint would fit if config.json named them."""
    if not tensors:
        return ""
    not_its_config = (ModelError, ArithmeticError, LookupError, TypeError)  # keys may mean something else to a family
    fitting = []
    for architecture, family in families.items():
        with contextlib.suppress(*not_its_config):
            plan_weights(tensors, _translated(architecture, family, hf), family.NAMES, source="")
            fitting.append(architecture)
    if not fitting:
        return ". Its tensors have the names and shapes of none of them"
    return (
        f". Its tensors have the names and shapes of {' and '.join(fitting)}: if it computes the same, "
        "write that into architectures in config.json"
    )
