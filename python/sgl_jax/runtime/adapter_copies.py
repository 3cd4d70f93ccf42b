"""Copies of adapters in the memory of all hosts: each reads its own files, and a load is good if all have the same."""

import logging
from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np

from sgl_jax.runtime.adapter_source import path_of
from sgl_jax.runtime.adapter_store import AdapterCopy, AdapterStore

logger = logging.getLogger(__name__)

FETCH, SETTLE, EVICT, DROP = "fetch adapter", "agree on adapter", "evict adapter", "drop adapter"
HOST_CALLS = (FETCH, SETTLE, EVICT, DROP)  # announced like programs
_NO_VECTOR = np.zeros(0, np.int32)


class AdapterCopies:
    """Tells every host which adapters to read and to drop. On the other hosts only `carry_out` and `vectors` are called."""

    def __init__(
        self,
        store: AdapterStore,
        limit: int,
        announce: Callable[[str, np.ndarray, str], None],
        agree: Callable[[int], int] = lambda value: value,
    ):
        """`limit`: adapters in memory, besides those that are being read or are about to be put into a slot. `agree` returns
        the least of the values that all hosts give."""
        self._store, self._limit, self._announce, self._agree = store, limit, announce, agree
        # Adapters that all hosts have read, without their vectors, by source; the least recently used first.
        self._settled: OrderedDict[str, AdapterCopy] = OrderedDict()
        self._promised: set[str] = set()  # sources of adapters that are about to be put into a slot

    def fetch_adapter(self, source: str) -> None:
        """Begin to read an adapter on every host, unless it is there. The least recently used one makes room."""
        if source in self._settled:
            self._settled.move_to_end(source)
        if self._store.find(source) is not None:
            return
        idle = [each for each in self._settled if each not in self._promised]
        for each in idle[: max(len(self._settled) + 1 - self._limit, 0)]:
            self._run(EVICT, each)
        self._run(FETCH, source)

    def find_adapter(self, source: str) -> AdapterCopy | None:
        """Return an adapter that all hosts have read, without its vectors; None while one still reads, or where it is not there."""
        copy = self._store.find(source)
        if copy is not None and copy.done() and source not in self._settled:
            self._run(SETTLE, source)
        return self._settled.get(source)

    def promise_adapter(self, source: str) -> None:
        """Keep an adapter that has been found until `vectors` or `release_adapter`."""
        self._promised.add(source)

    def release_adapter(self, source: str) -> None:
        self._promised.discard(source)

    def drop_adapter(self, source: str) -> None:
        """Forget an adapter on every host. It may still be in a slot."""
        self._promised.discard(source)
        self._run(DROP, source)

    def carry_out(self, call: str, source: str) -> None:
        """Do what host 0 announced, on this host."""
        if call == FETCH:
            self._store.fetch(source)
        elif call == SETTLE:
            self._settle(source)
        else:
            self._settled.pop(source, None)
            self._store.evict(source) if call == EVICT else self._store.drop(source)

    def vectors(self, source: str) -> jax.Array:
        """Return an adapter on this host's devices, as the program that loads it takes it."""
        self._promised.discard(source)
        return self._store.vectors(source)

    def _run(self, call: str, source: str) -> None:
        self._announce(call, _NO_VECTOR, source)
        self.carry_out(call, source)

    def _settle(self, source: str) -> None:
        """Wait until every host has read the adapter, and keep what they agree on."""
        copy = self._store.fetch(source).result()
        if copy.error:
            logger.warning("An adapter cannot be used: %s", copy.error)
        lowest, highest = self._agree(copy.checksum), -self._agree(-copy.checksum)
        if lowest != highest and not copy.error:
            other = "another host cannot use its files there, or has others; its log says more"
            copy = AdapterCopy(error=f"{path_of(source)}: {other}")
        self._settled[source] = copy._replace(vectors=())
