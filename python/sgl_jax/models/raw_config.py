"""The JSON files of a model folder, as they were read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RawConfig(dict[str, Any]):
    """config.json or generation_config.json. What a value is shows when it is read: hf_config.py does so strictly."""


def replaced(config: Mapping[str, Any], values: Mapping[str, Any]) -> RawConfig:
    """A copy with these values in place of its own."""
    return RawConfig({**config, **values})


def without(config: Mapping[str, Any], *keys: str) -> RawConfig:
    """A copy that lacks these keys."""
    return RawConfig({key: value for key, value in config.items() if key not in keys})
