"""Adapters in a host's memory, from where they are put into slots. Files are read in a thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from sgl_jax.models.lora_files import AdapterFiles
from sgl_jax.runtime.adapter_arrays import AdapterArrays
from sgl_jax.runtime.adapter_source import path_of

logger = logging.getLogger(__name__)


class AdapterCopy(NamedTuple):
    """Adapter in memory."""

    rank: int = 0
    num_matrices: int = 0
    checksum: int = 0  # made of its files; 0 where there is an error
    vectors: tuple[np.ndarray, ...] = ()  # one for each device of this host
    error: str = ""  # why it cannot be used; empty: it can


class AdapterStore:
    """Holds the adapters that were fetched and not evicted."""

    def __init__(self, open_adapter: Callable[[str], AdapterFiles], arrays: AdapterArrays):
        """`open_adapter` takes the path of an adapter, and raises ValueError for one that has no room in the slots."""
        self._open, self._arrays = open_adapter, arrays
        self._copies: dict[str, Future[AdapterCopy]] = {}  # by source
        self._fingerprints: dict[str, str] = {}  # by source, of the files that were read first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-adapters")

    def find(self, source: str) -> Future[AdapterCopy] | None:
        """Return an adapter that was fetched, once it is read; None if it is not here."""
        return self._copies.get(source)

    def fetch(self, source: str) -> Future[AdapterCopy]:
        """Begin to read an adapter, unless it is here."""
        if source not in self._copies:
            self._copies[source] = self._thread.submit(self._read, source)
        return self._copies[source]

    def vectors(self, source: str) -> jax.Array:
        """Return an adapter on the devices, as the program that loads it takes it."""
        return self._arrays.place(self.fetch(source).result().vectors)

    def evict(self, source: str) -> None:
        """Make room. The adapter may be fetched again, if its files are still the same."""
        if (copy := self._copies.pop(source, None)) is not None:
            copy.cancel()

    def drop(self, source: str) -> None:
        """Forget an adapter."""
        self.evict(source)
        self._fingerprints.pop(source, None)

    def _read(self, source: str) -> AdapterCopy:
        try:
            files = self._open(path_of(source))
            if files.fingerprint != self._fingerprints.setdefault(source, files.fingerprint):
                raise ValueError(f"the files in {files.path} have changed since the adapter was loaded; load it again")
            vectors = self._arrays.pack(files.factors())
            if not all(np.isfinite(vector).all() for vector in vectors):
                raise ValueError(f"{files.path} has values that {self._arrays.dtype} cannot hold; it is damaged")
        except (ValueError, OSError) as error:
            return AdapterCopy(error=str(error))
        except Exception as error:  # a file that nobody thought of ends no engine
            logger.exception("Reading an adapter failed")
            return AdapterCopy(error=f"{path_of(source)} cannot be read: {type(error).__name__}: {error}")
        return AdapterCopy(files.rank, files.num_matrices, files.checksum, vectors)
