"""The model of a plan: a path or a hub id as the server takes it, or the name of one whose config.json comes with us."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.families import add_package, decoder_config


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    config: DecoderConfig
    stored_dtype: str | None
    source: str  # where the config was read


def bundled() -> dict[str, str]:
    """The text of each bundled config.json, by the model's name."""
    files = resources.files("sgl_jax.planning").joinpath("configs").iterdir()
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".json")}


def find_model(path: str, download_dir: str | None = None, package: str | None = None) -> PlannedModel:
    """Reads configs only. A name or hub id whose config is bundled needs no network. Raises ModelError."""
    name = path.rpartition("/")[2].removesuffix("-Instruct")
    if not Path(path).expanduser().exists() and (text := bundled().get(name)):
        config: dict[str, Any] = json.loads(text)
        return PlannedModel(decoder_config(config), config["torch_dtype"], f"{name}, bundled")
    return read_model(path, download_dir, package)


def read_model(path: str, download_dir: str | None = None, package: str | None = None) -> PlannedModel:
    """The configs at a path or hub id; `package` is --model-package. Raises ModelError."""
    if package is not None:
        add_package(package)
    checkpoint = open_checkpoint(path, load_format="dummy", download_dir=download_dir)
    config = decoder_config(checkpoint.config, checkpoint.generation_config)
    return PlannedModel(config, checkpoint.dtype, str(checkpoint.path))
