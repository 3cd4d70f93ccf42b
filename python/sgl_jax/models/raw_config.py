"""JSON files of a model folder, as they were read."""

from collections.abc import Mapping
from typing import Any


class RawConfig(dict[str, Any]):
    """Content of config.json or generation_config.json. Values are checked where they are used (hf_config.py)."""


def replaced(config: Mapping[str, Any], values: Mapping[str, Any]) -> RawConfig:
    """Return a copy with these values in place of its own."""
    return RawConfig({**config, **values})


def without(config: Mapping[str, Any], *keys: str) -> RawConfig:
    """Return a copy that lacks these keys."""
    return RawConfig({key: value for key, value in config.items() if key not in keys})
