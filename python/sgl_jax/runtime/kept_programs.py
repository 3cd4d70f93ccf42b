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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FunctionType, MethodType

import jax
import numpy as np
from jax.experimental import serialize_executable

from sgl_jax.ops.cpu.library import processor_flags
from sgl_jax.runtime.compiler import Program

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent.parent
_ROOMS = ("models", "ops", "parallel", "runtime", "request.py", "step_plan.py")  # from which programs are made


class NoDescription(Exception):
    """A value is not described by what can be seen of it."""


class KeptPrograms:
    """Programs for these devices. `environment`: variables that compilers read."""

    def __init__(self, folder: str, devices: Sequence[jax.Device], environment: Mapping[str, str]):
        self._folder = Path(folder, "programs")
        self._devices = list(devices)
        packages = [(name, _version(name)) for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "tokamax")]
        machine = devices[0].client.platform_version, processor_flags(), _processors()
        settings = sorted(item for item in jax.config.values.items() if item[0] != "jax_compilation_cache_dir")
        self._launch = (
            packages,
            machine,
            [repr(device) for device in devices],
            _SOURCES,
            settings,
            sorted(environment.items()),
        )

    def load(self, program: Program, precision: str | None) -> jax.stages.Compiled | None:
        """Return the program compiled; None if it is not here, or cannot be read, which the log says."""
        path = self._path(program, precision)
        if path is None:
            return None
        taken, given = jax.tree.structure((program.args, {})), jax.tree.structure(program.outputs)
        try:
            data, platform = zlib.decompress(path.read_bytes()), self._devices[0].platform
            return serialize_executable.deserialize_and_load(data, taken, given, platform, self._devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a damaged file makes of its reader
            logger.warning("%s cannot be read (%s); %s is compiled again", path, type(error).__name__, program.name)
            if not isinstance(error, OSError):
                with contextlib.suppress(OSError):
                    path.unlink()
            return None

    def save(self, program: Program, precision: str | None, call: jax.stages.Compiled) -> None:
        """Keep a compiled program. A folder that takes nothing is left alone; the compilation cache has said so."""
        path = self._path(program, precision)
        if path is None:
            return
        with contextlib.suppress(
            OSError, ValueError, RuntimeError
        ):  # the last two: this kind of device serialises no program
            data, _, outputs = serialize_executable.serialize(call)
            if outputs != jax.tree.structure(program.outputs):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # gone whatever happens
                whole = Path(folder, path.name)
                whole.write_bytes(zlib.compress(data, 1))
                whole.replace(path)

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
    digest, seen = hashlib.sha256(), dict[int, int]()
    for part in _parts(value, seen):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(value: object, seen: dict[int, int]) -> Iterator[str]:
    """Yield texts that tell the value from others."""
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    inner: list[object] | None = None
    if isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, FunctionType):
        if id(value) in seen:  # it may refer to itself
            yield str(seen[id(value)])
            return
        seen[id(value)] = len(seen)
        code = value.__code__
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        at = value.__module__, value.__qualname__, code.co_firstlineno, _foreign(code.co_filename)
        inner = [*at, cells, value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, MethodType):
        inner = [value.__func__, value.__self__]
    elif isinstance(value, (np.ndarray, jax.Array)):
        array = np.asarray(value)
        inner = [str(array.dtype), array.shape, array.tobytes().hex()]
    elif isinstance(value, Mapping):
        inner = [len(value), *(item for pair in value.items() for item in pair)]
    elif isinstance(value, (set, frozenset)):
        inner = [len(value), *sorted(value, key=repr)]
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


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# Hash of what programs are made from in this package, as it was when this process imported it.
_SOURCES = _hash_of(
    path
    for path in _PACKAGE.rglob("*.*")
    if path.suffix in (".py", ".so", ".json") and path.relative_to(_PACKAGE).parts[0] in _ROOMS
)


@functools.cache
def _foreign(file: str) -> str:
    """Return a hash of the sources beside a function, and below, where it is no part of this package or of jax."""
    path = Path(file)
    if path.is_relative_to(_PACKAGE) or path.is_relative_to(Path(jax.__file__).parent) or not path.exists():
        return ""
    return _hash_of(path.parent.rglob("*.py"))


def _processors() -> int | None:
    """Return the number of processors that this process may use: XLA divides loops of CPU programs by it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
