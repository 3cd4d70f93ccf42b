"""Errors of this room."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class ModelError(ValueError):
    """A model cannot be served as it is. The message says what was found, what was looked for and what to change."""


@contextlib.contextmanager
def faults_named(file: str | Path, meaning: str) -> Iterator[None]:
    """Turn any fault that the content of a file causes into a ModelError that names it and says what that means."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # parsers raise errors of every kind on damaged and hostile content
        raise ModelError(f"{file}: {meaning} ({type(error).__name__}: {error!s:.200})") from error
