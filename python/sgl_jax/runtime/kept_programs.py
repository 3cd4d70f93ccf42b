"""Keeps compiled programs in a folder, so that a later start with the same programs traces and lowers none of them.

jax's compilation cache knows a program by its lowered text, which takes longer to make than the program takes to be read.
Here a program is known by all that its text is made from: the sources of this package, the program's arguments, and the
values that its function refers to.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from sgl_jax.ops.cpu.library import processor_flags
from sgl_jax.runtime.compiler import Program

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent.parent


class NoDescription(Exception):
    """A value is not described by what can be seen of it."""


class KeptPrograms:
    """Programs for these devices. `environment`: variables that compilers read."""

    def __init__(self, folder: str, devices: Sequence[jax.Device], environment: Mapping[str, str]):
        self._folder = Path(folder, "programs")
        self._devices = list(devices)
        versions = jax.__version__, jaxlib.__version__, devices[0].client.platform_version, processor_flags()
        settings = sorted(item for item in jax.config.values.items() if item[0] != "jax_compilation_cache_dir")
        ids = [(device.id, device.device_kind) for device in devices]
        self._launch = versions, ids, _sources(), settings, sorted(environment.items())

    def load(self, program: Program, precision: str | None) -> jax.stages.Compiled | None:
        """Return the program compiled; None if it is not here, or cannot be read, which the log says."""
        path = self._path(program, precision)
        if path is None or not path.exists():
            return None
        taken, given = jax.tree.structure((program.args, {})), jax.tree.structure(program.outputs)
        try:
            data, platform = zlib.decompress(path.read_bytes()), self._devices[0].platform
            return serialize_executable.deserialize_and_load(data, taken, given, platform, self._devices)
        except Exception as error:  # whatever a damaged file makes of its reader
            logger.warning("%s cannot be read (%s); %s is compiled again", path, type(error).__name__, program.name)
            path.unlink(missing_ok=True)
            return None

    def save(self, program: Program, precision: str | None, call: jax.stages.Compiled) -> None:
        """Keep a compiled program. A folder that takes nothing is left alone; the compilation cache has said so."""
        path = self._path(program, precision)
        if path is None:
            return
        with contextlib.suppress(OSError, ValueError, NotImplementedError):  # the last two: it cannot be serialised
            data, _, outputs = serialize_executable.serialize(call)
            if outputs != jax.tree.structure(program.outputs):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(zlib.compress(data, 1))
            os.replace(file.name, path)

    def _path(self, program: Program, precision: str | None) -> Path | None:
        try:
            name = described((self._launch, program.name, precision, program.function, program.args))
        except NoDescription:
            return None
        return self._folder / name


def described(value: object) -> str:
    """Return a hash of all that a value is made of: equal values have equal ones, in every process.

    Raises NoDescription for an object of which only its address is known.
    """
    digest, seen = hashlib.sha256(), set()
    for part in _parts(value, seen):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(value: object, seen: set[int]) -> Iterator[str]:
    """Yield texts that tell the value from others."""
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    inner: list[object] | None = None
    if isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, FunctionType):
        if id(value) in seen:  # it refers to itself
            return
        seen.add(id(value))
        code = value.__code__
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        at = value.__module__, value.__qualname__, code.co_firstlineno, _foreign(code.co_filename)
        inner = [*at, cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, np.ndarray):
        inner = [value.dtype.str, value.shape, value.tobytes().hex()]
    elif isinstance(value, Mapping):
        inner = [item for pair in value.items() for item in pair]
    elif isinstance(value, (set, frozenset)):
        inner = sorted(value, key=repr)
    elif isinstance(value, (list, tuple)):
        inner = [len(value), *value]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        inner = [value.__module__, value.__qualname__, getattr(value, "__wrapped__", None)]
    if inner is None:
        if " at 0x" in (text := repr(value)):
            raise NoDescription(text)
        yield text
    else:
        for each in inner:
            yield from _parts(each, seen)


@functools.cache
def _sources() -> str:
    """Return a hash of the package's sources, and so of all functions of it."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.so") for path in _PACKAGE.rglob(kind)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _foreign(file: str) -> str:
    """Return a hash of a function's file where it is no part of this package."""
    path = Path(file)
    return "" if path.is_relative_to(_PACKAGE) or not path.exists() else hashlib.sha256(path.read_bytes()).hexdigest()
