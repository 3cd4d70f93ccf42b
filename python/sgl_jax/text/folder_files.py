"""Reads the files of a tokenizer's folder. Whatever is wrong with one, the error names it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgl_jax.models.model_errors import ModelError

_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file, in a ModelError, in whatever goes wrong in the block that reads it; a Git LFS pointer at once."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ModelError(
                    f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder, "
                    "or download it again"
                )
    try:
        yield
    except (ModelError, OSError):
        raise
    except Exception as error:  # parsers raise errors of every kind on damaged content
        reason = str(error) or type(error).__name__
        raise ModelError(f"{path} is damaged or not what its name says ({reason:.200}); download it again") from error


def read_text(path: Path) -> str:
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


class JsonFile:
    """Fields of a JSON file, none if there is no such file. Raises ModelError for content that is no JSON object."""

    def __init__(self, path: Path):
        self.path = path
        self.fields: dict[str, Any] = {}
        if path.is_file():
            with reading(path):
                found = json.loads(read_text(path))
            if not isinstance(found, dict):
                raise ModelError(f"{path} holds a {type(found).__name__}; it must be a JSON object")
            self.fields = found

    def get[T](self, name: str, *kinds: type[T]) -> T | None:
        """Return the value of a field, None where there is none. Raises ModelError for a value of another kind."""
        value = self.fields.get(name)
        if value is None or isinstance(value, kinds):
            return value
        raise self.wrong(name, value, " or ".join(kind.__name__ for kind in kinds))

    def wrong(self, name: str, value: object, wanted: str) -> ModelError:
        return ModelError(f"{self.path} has {name} {value!r:.80}; it must be {wanted}")
