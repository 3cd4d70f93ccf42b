"""Descriptions of formats: what decides how devices hold their matrices, and which modules they leave alone."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import Literal

from sgl_jax.models.model_errors import faults_named
from sgl_jax.ops.quantized_matmul.api import Rounding

WITHIN = "quantization_config."  # where messages say that fields are

# int8 by channel, for tokens rounded to int8 (w8a8) or not; float8 by channel or tensor, or by blocks; 4 or 8 bits in groups;
# anything else, such as groups out of order and E2M1.
Kind = Literal["w8a8", "int8", "fp8", "fp8 blocks", "groups", "other"]


@dataclasses.dataclass(frozen=True)
class Form:
    """Form of a checkpoint's quantised matrices."""

    method: str  # its quant_method
    about: str
    kind: Kind
    dtype: str = "int8"  # the dtype of the values
    group: int | None = None  # inputs that share a scale; None: all do
    offsets: bool = False  # values are not symmetric
    rounding: Rounding | None = None  # to what tokens are meant to be rounded

    def __str__(self) -> str:
        return f"{self.method}, {self.about}"


def named(module: str, patterns: Iterable[str]) -> bool:
    """Tell whether a list of modules names one: by its name, that of a module around it, the end of its name, a pattern with *,
    or "re:" and a regular expression."""
    return any(_names(pattern, module) for pattern in patterns)


def _names(pattern: str, module: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(module, pattern) or f".{pattern}." in f".{module}."
    with faults_named("config.json", f"quantization_config has {pattern!r}, which is no regular expression"):
        return re.match(pattern[3:], module) is not None
