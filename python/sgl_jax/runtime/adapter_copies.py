"""Copies of adapters in the memory of all hosts: each reads its own files, and a load is good if it is on all of them."""

import logging
from collections.abc import Callable

import jax
import numpy as np

from sgl_jax.runtime.adapter_store import AdapterCopy, AdapterStore

logger = logging.getLogger(__name__)

FETCH, SETTLE, DROP = "fetch adapter", "agree on adapter", "drop adapter"
HOST_CALLS = (FETCH, SETTLE, DROP)  # announced like programs
_NO_VECTOR = np.zeros(0, np.int32)


class AdapterCopies:
    """Tells every host which adapters to read and to drop. On the other hosts only `carry_out` and `vectors` are called."""

    def __init__(
        self,
        store: AdapterStore,
        announce: Callable[[str, np.ndarray, str], None],
        agree: Callable[[int], int] = lambda value: value,
    ):
        """`agree` returns the least of the values that all hosts give."""
        self._store, self._announce, self._agree = store, announce, agree
        self._settled: dict[str, AdapterCopy] = {}  # copies that all hosts have read, by source

    def fetch_adapter(self, source: str) -> None:
        """Begin to read an adapter on every host, unless it is there."""
        if self._store.find(source) is None:
            self._settled.pop(source, None)
            self._run(FETCH, source)

    def find_adapter(self, source: str) -> AdapterCopy | None:
        """Return an adapter that all hosts have read; None while one still reads, or where it is not there."""
        copy = self._store.find(source)
        if copy is not None and copy.done() and source not in self._settled:
            self._run(SETTLE, source)
        return self._settled.get(source) if copy is not None else None

    def drop_adapter(self, source: str) -> None:
        """Forget an adapter on every host. It may still be in a slot."""
        self._run(DROP, source)

    def carry_out(self, call: str, source: str) -> None:
        """Do what host 0 announced, on this host."""
        match call:
            case "fetch adapter":
                self._store.fetch(source)
            case "agree on adapter":
                self._settle(source)
            case "drop adapter":
                self._store.drop(source)
                self._settled.pop(source, None)

    def vectors(self, source: str) -> jax.Array:
        """Return an adapter on this host's devices, as the program that loads it takes it."""
        return self._store.vectors(source)

    def _run(self, call: str, source: str) -> None:
        self._announce(call, _NO_VECTOR, source)
        self.carry_out(call, source)

    def _settle(self, source: str) -> None:
        """Wait until every host has read the adapter, and keep what they agree on."""
        copy = self._store.agree(source)
        if copy.error:
            logger.warning("An adapter cannot be used: %s", copy.error)
        if not self._agree(int(not copy.error)) and not copy.error:
            copy = AdapterCopy(error="another host cannot use its copy of the adapter, and says why in its log")
        self._settled[source] = copy
