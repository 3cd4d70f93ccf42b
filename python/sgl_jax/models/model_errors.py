"""Errors of this room."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

# Whatever reading a damaged or hostile file may raise: wrong types and keys, sizes that do not fit, endless nesting.
_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error, OSError)


class ModelError(ValueError):
    """A model cannot be served as it is. The message says what was found, what was looked for and what to change."""


@contextlib.contextmanager
def faults_named(file: str | Path, meaning: str) -> Iterator[None]:
    """Turn any fault that the content of a file causes into a ModelError that names it and says what that means."""
    try:
        yield
    except ModelError:
        raise
    except _FAULTS as error:
        raise ModelError(f"{file}: {meaning} ({type(error).__name__}: {error})") from error
