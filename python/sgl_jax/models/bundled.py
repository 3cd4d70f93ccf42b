"""Finds the config.json files that come with us: `--model-path config:qwen3-8b` is a model without its weights."""

import json
from importlib import resources
from pathlib import Path

from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.raw_config import RawConfig

PREFIX = "config:"


def bundled() -> dict[str, str]:
    """Return the text of each bundled config.json, by the model's name."""
    files = resources.files("sgl_jax.models").joinpath("configs").iterdir()
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".json")}


def bundled_name(path: str) -> str | None:
    """Return the model that config:NAME means; None for another path. Raises ModelError for an unknown name."""
    if not path.startswith(PREFIX):
        return None
    wanted = path.removeprefix(PREFIX)
    found = {name.lower(): name for name in bundled()}.get(wanted.lower())
    if found is None:
        raise ModelError(f"there is no config {wanted!r}; there are {', '.join(sorted(bundled()))}")
    return found


def bundled_config(name: str) -> RawConfig:
    return RawConfig(json.loads(bundled()[name]))
