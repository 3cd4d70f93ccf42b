"""Adapters in a host's memory, from where they are put into slots. Files are read in a thread."""

from __future__ import annotations

import logging
from collections import OrderedDict
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
    vectors: tuple[np.ndarray, ...] = ()  # one for each device of this host
    error: str = ""  # why it cannot be used; empty: it can


class AdapterStore:
    """Holds the adapters that were fetched last: `limit` of them, and those that hosts have still to agree on. Every host of an
    engine makes the same calls in the same order, so that all hold the same ones."""

    def __init__(self, open_adapter: Callable[[str], AdapterFiles], arrays: AdapterArrays, limit: int):
        """`open_adapter` takes the path of an adapter."""
        self._open, self._arrays, self._limit = open_adapter, arrays, limit
        self._copies: OrderedDict[str, Future[AdapterCopy]] = OrderedDict()  # by source, the last used last
        self._agreed: set[str] = set()  # sources; only these make room for others
        self._fingerprints: dict[str, str] = {}  # by source, of the files that were read first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-adapters")

    def find(self, source: str) -> Future[AdapterCopy] | None:
        """Return an adapter that was fetched, once it is read; None if it is not here."""
        return self._copies.get(source)

    def fetch(self, source: str) -> Future[AdapterCopy]:
        """Begin to read an adapter, unless it is here. The least recently used one makes room."""
        if source not in self._copies:
            agreed = [each for each in self._copies if each in self._agreed]
            for each in agreed[: max(len(self._copies) + 1 - self._limit, 0)]:
                self._forget(each)
            self._copies[source] = self._thread.submit(self._read, source)
        self._copies.move_to_end(source)
        return self._copies[source]

    def agree(self, source: str) -> AdapterCopy:
        """Wait until an adapter is read, and let it make room for others from now on."""
        copy = self.fetch(source).result()
        self._agreed.add(source)
        return copy

    def vectors(self, source: str) -> jax.Array:
        """Return an adapter on the devices, as the program that loads it takes it."""
        return self._arrays.place(self.fetch(source).result().vectors)

    def drop(self, source: str) -> None:
        """Forget an adapter."""
        self._forget(source)
        self._fingerprints.pop(source, None)

    def _forget(self, source: str) -> None:
        self._agreed.discard(source)
        if (copy := self._copies.pop(source, None)) is not None:
            copy.cancel()

    def _read(self, source: str) -> AdapterCopy:
        try:
            files = self._open(path_of(source))
            if files.fingerprint != self._fingerprints.setdefault(source, files.fingerprint):
                raise ValueError(f"the files in {files.path} have changed since the adapter was loaded; load it again")
            self._check(files)
            vectors = self._arrays.pack(files.factors())
        except (ValueError, OSError) as error:
            return AdapterCopy(error=str(error))
        except Exception as error:  # a file that nobody thought of ends no engine
            logger.exception("Reading an adapter failed")
            return AdapterCopy(error=f"{path_of(source)} cannot be read: {type(error).__name__}: {error}")
        return AdapterCopy(files.rank, files.num_matrices, vectors)

    def _check(self, files: AdapterFiles) -> None:
        """Raises ValueError for an adapter that has no room in the slots."""
        slots = self._arrays.slots
        if files.rank > slots.rank:
            raise ValueError(f"{files.path} has rank {files.rank}; --max-lora-rank is {slots.rank}")
        if outside := sorted({*files.sites} - {*slots.sites}):
            named = "they are in neither --lora-target-modules nor an adapter of --lora-paths"
            raise ValueError(f"{files.path} changes the products {', '.join(outside)}; {named}")
