"""Versions, flags and model files that all hosts of an engine must have in common, and how two hosts differ."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from sgl_jax import __version__
from sgl_jax.multihost.wire import Identity, Scalar
from sgl_jax.settings.attention_backends import GROUP
from sgl_jax.settings.server_args import FLAGS, ServerArgs

_PACKAGES = ("jax", "jaxlib", "libtpu")
_TAIL = 1 << 16  # bytes at the end of each weight file that are hashed: a fine-tuned model has files of equal size


def identity_of(args: ServerArgs, configs: Mapping[str, Mapping[str, object]], weights: Path | None) -> Identity:
    """Return versions, shared flags and fingerprints of the model's files. `configs` are by file name; `weights` is a
    folder, a file or None for dummy weights."""
    versions = {"sgl_jax": __version__}
    for name in (*_PACKAGES, *_packages_of(args.attention_backend)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Identity(versions, shared_flags(args), model_files(configs, weights))


def _packages_of(backend: str | None) -> list[str]:
    """Return names of packages to compare: the one that brings the attention backend, and the one named as it is."""
    points = importlib.metadata.entry_points(group=GROUP, name=backend or "")
    return [name for point in points for name in (point.dist.name if point.dist else "", point.name) if name]


def shared_flags(args: ServerArgs) -> dict[str, Scalar]:
    """Return, by option, the values of all flags that must agree."""
    return {each.option: getattr(args, each.name) for each in FLAGS if not each.about.per_host}


def model_files(configs: Mapping[str, Mapping[str, object]], weights: Path | None) -> dict[str, str]:
    """Return a fingerprint by file name. Neither the times of the files nor their folder count."""
    found = {name: _hash(json.dumps(config, sort_keys=True).encode()) for name, config in configs.items()}
    if weights is not None and weights.is_file():
        return found | {"the .gguf file": _fingerprint(weights)}
    files = [] if weights is None else [*weights.glob("*.safetensors"), *weights.glob("*.gguf")]
    return found | {file.name: _fingerprint(file) for file in files}


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        opened.seek(max(size - _TAIL, 0))
        return f"{size} bytes, ends in {_hash(opened.read())}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differences(here: Identity, there: Identity, other: str) -> list[str]:
    """Return a sentence for each difference. `here` is host 0's identity, `other` names the other host."""
    found = []
    for mine, theirs, prefix in (
        (here.versions, there.versions, ""),
        (here.flags, there.flags, ""),
        (here.model, there.model, "the model differs: "),
    ):
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(name), theirs.get(name)
            if (a, type(a)) != (b, type(b)):
                found.append(f"{prefix}{name} is {_shown(b)} on {other} and {_shown(a)} on host 0")
    return found


def _shown(value: Scalar) -> str:
    return "not there or not set" if value is None else str(value)
