"""Opens a model's folder, .gguf file or hub id as a Checkpoint."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from sgl_jax.models.bundled import bundled_config, bundled_name
from sgl_jax.models.gguf import gguf_config, gguf_tensors
from sgl_jax.models.gguf_file import read_gguf
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig
from sgl_jax.models.safetensors_file import read_safetensors
from sgl_jax.models.stored import StoredTensor, shard_name
from sgl_jax.settings.hub import HUGGING_FACE, Downloads, HubError, local_path

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_OTHER_LAYOUTS = ["original/*", "consolidated*"]  # the same weights again, under other names
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-TP-(\d{3})\.safetensors$")  # saved by each device of a tensor-parallel group for itself


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Configs and descriptions of the tensors of a model."""

    path: Path  # the folder or the .gguf file
    format: Literal["safetensors", "gguf", "dummy"]
    config: RawConfig  # config.json, or what it would have been
    generation_config: RawConfig  # may be empty
    tokenizer_path: Path  # a folder with tokenizer.json and the like, or a .gguf file
    tensors: Mapping[str, StoredTensor]  # by Hugging Face name; none for "dummy"

    @property
    def total_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """Dtype in which the weights were saved ("bfloat16"), if the config says so."""
        return self.config.get("dtype") or self.config.get("torch_dtype")


def open_checkpoint(path: str, *, load_format: LoadFormat = "auto", downloads: Downloads = HUGGING_FACE) -> Checkpoint:
    """Read configs and headers, but no weights. A hub id is downloaded first. Raises ModelError."""
    if (name := bundled_name(path)) is not None:
        if load_format != "dummy":
            raise ModelError(f"--model-path {path} is a config without weights; it needs --load-format dummy")
        return Checkpoint(Path(path), "dummy", bundled_config(name), RawConfig(), Path(path), {})
    files = _TOKENIZER_FILES + (["*.safetensors"] if load_format != "dummy" else [])
    try:
        local = local_path(path, files, downloads, without=_OTHER_LAYOUTS)
    except HubError as error:
        raise ModelError(str(error)) from error
    dummy = load_format == "dummy"
    if (file := _gguf_file(local, load_format)) is not None:
        gguf = read_gguf(file)
        tensors = {} if dummy else gguf_tensors(gguf)
        return Checkpoint(file, "dummy" if dummy else "gguf", gguf_config(gguf), RawConfig(), file, tensors)
    config = _read_json(local / "config.json")
    if config is None:
        raise ModelError(f"{local} has no config.json; --model-path needs a Hugging Face model folder or a .gguf file")
    generation_config = _read_json(local / "generation_config.json") or RawConfig()
    tensors = {} if dummy else _safetensors(local)
    return Checkpoint(local, "dummy" if dummy else "safetensors", config, generation_config, local, tensors)


def _gguf_file(local: Path, load_format: LoadFormat) -> Path | None:
    """Return the .gguf file to read, or None where safetensors are meant."""
    if local.is_file():
        if local.suffix != ".gguf" or load_format == "safetensors":
            wanted = "a folder with *.safetensors" if load_format == "safetensors" else "a folder or a .gguf file"
            raise ModelError(f"{local} is a file; --load-format {load_format} reads {wanted}")
        return local
    found = sorted(local.glob("*.gguf"))
    if load_format in ("safetensors", "dummy"):
        return None
    if load_format == "auto" and (not found or any(local.glob("*.safetensors"))):
        return None
    if len(found) != 1:
        raise ModelError(
            f"{local} holds {len(found)} .gguf files{': ' if found else ''}{', '.join(f.name for f in found)}; "
            "give the path of one"
        )
    return found[0]


def _safetensors(folder: Path) -> dict[str, StoredTensor]:
    index = _read_json(folder / _INDEX)
    if index is not None and not any(map(_SHARD.search, index["weight_map"].values())):  # an index names one shard
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise ModelError(f"{folder / _INDEX} names {', '.join(missing)}, which are not there; download them")
    else:
        files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("consolidated"))
    if not files:
        other = ", ".join(sorted(f.name for f in folder.glob("*.bin")))
        cure = f", only {other}; convert it to safetensors" if other else ""
        raise ModelError(f"{folder} has no *.safetensors{cure}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        stored = read_safetensors(file)
        if shard := _SHARD.search(file.name):
            stored = {shard_name(name, int(shard[1])): tensor for name, tensor in stored.items()}
        if twice := sorted(set(stored) & set(tensors)):
            raise ModelError(f"{file} repeats tensors of another file in {folder}: {', '.join(twice[:5])}; remove one")
        tensors.update(stored)
    return tensors


def _read_json(path: Path) -> RawConfig | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ModelError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a JSON {type(found).__name__}; it must hold an object")
    return RawConfig(found)
