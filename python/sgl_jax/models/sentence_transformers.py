"""Reads how a folder in sentence-transformers' format makes vectors: modules.json, and the files that it names."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from sgl_jax.models.folder_files import JsonFile, read_text
from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.raw_config import RawConfig

# Names of the files, for the hub.
POOLING_FILES = ("modules.json", "*_Pooling/config.json", "config_sentence_transformers.json")

type Method = Literal["last", "mean"]

_METHODS: dict[str, Method] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "lasttoken": "last",  # this and the next are the names of pooling_mode in newer files
    "mean": "mean",
}
_SERVED = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


class SentencePooling(NamedTuple):
    """Part of a model that makes a vector of hidden states."""

    method: Method = "last"
    normalize: bool = True
    prompts: Mapping[str, str] = MappingProxyType({})  # by name
    default_prompt: str = ""  # a name; empty: none


def sentence_pooling(folder: Path, config: RawConfig | None = None) -> SentencePooling | None:
    """Read the modules of a folder; None if it has none that pool. Raises ModelError for modules that are not served. A GGUF
    file says it in its `config`; llama.cpp divides its vectors by their length."""
    file = folder / "modules.json"
    if not file.is_file():
        named = None if config is None else config.get("gguf_pooling")
        return None if named is None else SentencePooling(_METHODS[named])
    with faults_named(file, "no list of sentence-transformers' modules"):
        modules = [(each["type"].rpartition(".")[2], each["path"]) for each in json.loads(read_text(file))]
    kinds = [kind for kind, _ in modules]
    if "Pooling" not in kinds:
        return None
    if kinds not in _SERVED:
        raise ModelError(f"{file} has the modules {', '.join(kinds)}; served are Transformer, Pooling and Normalize")
    place = dict(modules)["Pooling"]
    if place != Path(place).name:
        raise ModelError(f"{file} has the path {place!r}; it must be a folder beside it")
    prompts = JsonFile(folder / "config_sentence_transformers.json")
    return SentencePooling(
        _method(JsonFile(folder / place / "config.json")),
        "Normalize" in kinds,
        {name: text for name, text in (prompts.get("prompts", dict) or {}).items() if text},
        prompts.get("default_prompt_name", str) or "",
    )


def _method(config: JsonFile) -> Method:
    if (named := config.get("pooling_mode", str)) is not None:
        modes = [named]
    else:
        modes = [name for name, on in config.fields.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _METHODS:
        found = " and ".join(modes) or "no pooling mode"
        raise ModelError(f"{config.path} has {found}; served are pooling_mode_mean_tokens and pooling_mode_lasttoken")
    if (method := _METHODS[modes[0]]) == "mean" and config.get("include_prompt", bool) is False:
        raise config.wrong("include_prompt", False, "true: the mean over a part of the tokens is not built")
    return method
