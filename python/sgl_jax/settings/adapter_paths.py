"""Adapters as users write them: SGLang's PATH, NAME=PATH and JSON, and vLLM's JSON."""

import json
import os
from collections.abc import Collection
from typing import NamedTuple

from sgl_jax.settings.flag_parser import FlagError

ANY_MODEL = "default"  # a name for the served model, which SGLang's clients send
_LONGEST_NAME = 512  # characters
_FORMS = 'write PATH, NAME=PATH or {"lora_name": NAME, "lora_path": PATH, "pinned": false}'
_KINDS = {"lora_name": str, "lora_path": str, "pinned": bool, "base_model_name": str}
_OURS = {"name": "lora_name", "path": "lora_path"}  # by vLLM's key


class AdapterPath(NamedTuple):
    name: str
    path: str  # a folder or a hub id
    pinned: bool = False  # it never leaves the devices


def adapter_path(text: str) -> tuple[AdapterPath, str | None]:
    """Read a value of --lora-paths, and the name of the adapter's base model where it says one. Raises FlagError."""
    if text.startswith("{"):
        return _from_json(text)
    name, found, path = text.partition("=")
    if not name or (found and not path):
        raise _wrong(text, "a name or a path is empty")
    return AdapterPath(name, os.path.expanduser(path or name)), None


def _from_json(text: str) -> tuple[AdapterPath, str | None]:
    try:
        given = json.loads(text)
    except ValueError:
        raise _wrong(text, "it is not JSON") from None
    values = {_OURS.get(key, key): value for key, value in given.items() if value is not None}
    if unknown := values.keys() - _KINDS.keys():
        raise _wrong(text, f"it has {', '.join(sorted(unknown))}")
    for key, kind in _KINDS.items():
        if not isinstance(values.get(key, kind("")), kind):
            raise _wrong(text, f"{key} is {values[key]!r}")
    if not values.get("lora_name") or not values.get("lora_path"):
        raise _wrong(text, "it needs a name and a path")
    path = os.path.expanduser(values["lora_path"])
    return AdapterPath(values["lora_name"], path, values.get("pinned", False)), values.get("base_model_name")


def _wrong(text: str, reason: str) -> FlagError:
    return FlagError("--lora-paths", f"--lora-paths has {text}; {reason}; {_FORMS}")


def wrong_name(name: str, served: Collection[str]) -> str:
    """Say why an adapter cannot have this name; empty: it can. `served`: the names of the model."""
    if name.rstrip("/") in {each.rstrip("/") for each in (ANY_MODEL, *served)}:
        return "this name means the served model"
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        return f"a name has 1 to {_LONGEST_NAME} characters, all of them visible"
    return ""
