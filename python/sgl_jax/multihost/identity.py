"""What the hosts of one engine must have in common: versions, flags and the model's files; and how they differ."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from sgl_jax import __version__
from sgl_jax.multihost.wire import Identity, Scalar
from sgl_jax.server_args import FLAGS, ServerArgs

_PACKAGES = ("jax", "jaxlib", "libtpu")
_CONFIGS = ("config.json", "generation_config.json")
_TAIL = 1 << 16  # bytes of each weight file that are hashed: a fine-tune has its model's sizes, not its last values


def identity_of(args: ServerArgs, path: Path) -> Identity:
    """`path` is the model's folder or file."""
    versions = {"sgl_jax": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Identity(versions, shared_flags(args), model_files(path, weights=args.load_format != "dummy"))


def shared_flags(args: ServerArgs) -> dict[str, Scalar]:
    """Values by option, of all flags that must agree."""
    return {each.option: getattr(args, each.name) for each in FLAGS if not each.about.per_host}


def model_files(path: Path, *, weights: bool) -> dict[str, str]:
    """A fingerprint by file name, in words: the times of the files do not count, nor where they lie."""
    if path.is_file():
        return {"the .gguf file": _fingerprint(path)}
    patterns = [*_CONFIGS, *(("*.safetensors", "*.gguf") if weights else ())]
    return {file.name: _fingerprint(file) for pattern in patterns for file in path.glob(pattern)}


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        opened.seek(max(size - _TAIL, 0))
        return f"{size} bytes, ends in {hashlib.sha256(opened.read()).hexdigest()[:16]}"


def differences(here: Identity, there: Identity, other: str) -> list[str]:
    """One sentence for each thing that differs. `here` is host 0's, `other` names the other host."""
    found = []
    for mine, theirs, what in (
        (here.versions, there.versions, "{} is {} on {other} and {} on host 0"),
        (here.flags, there.flags, "{} is {} on {other} and {} on host 0"),
        (here.model, there.model, "the model differs: {} is {} on {other} and {} on host 0"),
    ):
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(name), theirs.get(name)
            if (a, type(a)) != (b, type(b)):
                found.append(what.format(name, _shown(b), _shown(a), other=other))
    return found


def _shown(value: Scalar) -> str:
    return "not there or not set" if value is None else str(value)
