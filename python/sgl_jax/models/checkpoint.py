"""Opens a model's folder, .gguf file or hub id as a Checkpoint."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from sgl_jax.models.bundled import bundled_config, bundled_name
from sgl_jax.models.folder_files import JsonFile
from sgl_jax.models.formats.find import quantization_config
from sgl_jax.models.gguf import gguf_config, gguf_tensors
from sgl_jax.models.gguf_file import read_gguf
from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.raw_config import RawConfig, replaced
from sgl_jax.models.safetensors_file import read_safetensors
from sgl_jax.models.sentence_transformers import POOLING_FILES
from sgl_jax.models.stored import StoredTensor, shard_name
from sgl_jax.settings.hub import HUGGING_FACE, Downloads, HubError, local_path, refuse_no_model

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

# Files that decide a launch before weights are fetched.
CONFIG_FILES = ["config.json", "generation_config.json", "hf_quant_config.json", *POOLING_FILES]
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_OTHER_LAYOUTS = ["original/*", "consolidated*"]  # the same weights again, under other names
_INDEX = "model.safetensors.index.json"
# Files that are no part of the model: LoRA, running averages, training states, the same weights in Mistral's layout.
_LEFT_BEHIND = re.compile(r"^(consolidated|adapters?|lora|ema|optim|optimizer|scheduler|training)[._-]|[._-]ema[._-]")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
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
        configs = (self.config, self.config.get("text_config") or {})
        return next((config[key] for config in configs for key in ("dtype", "torch_dtype") if config.get(key)), None)


def open_checkpoint(path: str, *, load_format: LoadFormat = "auto", downloads: Downloads = HUGGING_FACE) -> Checkpoint:
    """Read configs and headers, but no weights. A hub id is downloaded first. Raises ModelError."""
    if (name := bundled_name(path)) is not None:
        if load_format != "dummy":
            raise ModelError(f"--model-path {path} is a config without weights; it needs --load-format dummy")
        return Checkpoint(Path(path), "dummy", bundled_config(name), RawConfig(), Path(path), {})
    files = _TOKENIZER_FILES + (["*.safetensors"] if load_format != "dummy" else [])
    try:
        local = local_path(path, files, downloads, without=_OTHER_LAYOUTS)
        refuse_no_model(local)
    except HubError as error:
        raise ModelError(str(error)) from error
    dummy = load_format == "dummy"
    if (file := _gguf_file(local, load_format)) is not None:
        gguf = read_gguf(file)
        with faults_named(file, "damaged; download it again"):
            config, tensors = gguf_config(gguf), {} if dummy else gguf_tensors(gguf)
        return Checkpoint(file, "dummy" if dummy else "gguf", config, RawConfig(), file, tensors)
    if not (local / "config.json").is_file():
        raise ModelError(f"{local} has no config.json; --load-format {load_format} reads it")
    config, generation = (JsonFile(local / name).fields for name in ("config.json", "generation_config.json"))
    if not quantization_config(config) and (beside := JsonFile(local / "hf_quant_config.json").fields):
        config = replaced(config, {"quantization_config": beside | {"quant_method": "modelopt"}})
    tensors = {} if dummy else _safetensors(local)
    return Checkpoint(local, "dummy" if dummy else "safetensors", config, generation, local, tensors)


def _gguf_file(local: Path, load_format: LoadFormat) -> Path | None:
    """Return the .gguf file to read, or None where safetensors are meant."""
    if local.is_file():
        if local.suffix != ".gguf" or load_format == "safetensors":
            wanted = "a folder with *.safetensors" if load_format == "safetensors" else "a folder or a .gguf file"
            raise ModelError(f"{local} is a file; --load-format {load_format} reads {wanted}")
        return local
    found = sorted(file for file in local.glob("*.gguf") if not file.name.startswith("mmproj"))  # no vision projectors
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
    files = _weight_files(folder)
    if not files:
        raise ModelError(f"{folder} has no model.safetensors or shards of it{_other_weights(folder)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        stored = read_safetensors(file)
        if shard := _SHARD.search(file.name):
            stored = {shard_name(name, int(shard[1])): tensor for name, tensor in stored.items()}
        if twice := sorted(set(stored) & set(tensors)):
            raise ModelError(f"{file} repeats tensors of another file in {folder}: {', '.join(twice[:5])}; remove one")
        tensors.update(stored)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights: model.safetensors if it is there, else those of the index, as
    transformers has it; else the shards without an index, complete; else all but what training left behind."""
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    if (folder / _INDEX).is_file():
        named = _indexed(JsonFile(folder / _INDEX))
        if not any(map(_SHARD.search, named)):  # an index names one shard of each
            return _all_there(folder, named, f"{folder / _INDEX} names")
    found = sorted(file for file in folder.glob("*.safetensors") if not _LEFT_BEHIND.search(file.name))
    shards = {(match[1], int(match[2])) for file in found if (match := _NUMBERED.fullmatch(file.name))}
    if len(shards) == 1:
        ((stem, number),) = shards
        named = {f"{stem}-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)}
        return _all_there(folder, named, f"{folder} holds a part of")
    return found


def _indexed(index: JsonFile) -> set[str]:
    """Return the names of the files in an index. Raises ModelError for one that is damaged or leaves the folder."""
    names = index.fields.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise index.wrong("weight_map", names, "the file of each tensor, by name; download it again")
    if outside := sorted({name for name in names.values() if Path(name).is_absolute() or ".." in Path(name).parts}):
        raise ModelError(f"{index.path}: weight_map names {outside[0]!r}; files must lie in the model's folder")
    return set(names.values())


def _all_there(folder: Path, names: set[str], what: str) -> list[Path]:
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelError(f"{what} {', '.join(missing[:5])}{more}, which are not there; download them")
    return [folder / name for name in sorted(names)]


def _other_weights(folder: Path) -> str:
    """Say which other files with weights there are, and what to do with them."""
    endings = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5")
    other = ", ".join(sorted(file.name for ending in endings for file in folder.glob(ending)))
    return f", only {other}; convert it to safetensors in Hugging Face's layout" if other else "; download them"
