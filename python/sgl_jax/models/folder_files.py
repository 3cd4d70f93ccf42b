"""Reads the files of a model's folder. Whatever is wrong with one, the error names it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from sgl_jax.models.model_errors import ModelError, faults_named
from sgl_jax.models.raw_config import RawConfig

_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file, in a ModelError, in whatever goes wrong in the block that reads it; a Git LFS pointer at once."""
    with faults_named(path, "cannot be read; if it is damaged, download it again"):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise ModelError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        yield


def read_text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


class JsonFile:
    """Fields of a JSON file, none if there is no such file. Raises ModelError for content that is no JSON object."""

    def __init__(self, path: Path):
        self.path, self.fields = path, RawConfig()
        if path.is_file():
            with reading(path), faults_named(path, "cannot be read as JSON"):
                found = json.loads(path.read_bytes())
            if not isinstance(found, dict):
                raise ModelError(f"{path} holds a JSON {type(found).__name__}; it must be an object")
            self.fields = RawConfig(found)

    def get[T](self, name: str, *kinds: type[T]) -> T | None:
        """Return the value of a field, None where there is none. Raises ModelError for a value of another kind."""
        value = self.fields.get(name)
        if value is None or isinstance(value, kinds):
            return value
        raise self.wrong(name, value, " or ".join(kind.__name__ for kind in kinds))

    def wrong(self, name: str, value: object, wanted: str) -> ModelError:
        return ModelError(f"{self.path} has {name} {value!r:.80}; it must be {wanted}")
