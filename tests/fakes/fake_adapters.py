"""Hosts that read adapters after a while, and have room for a few."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict


@dataclasses.dataclass(frozen=True)
class FakeCopy:
    rank: int = 8
    num_matrices: int = 7
    error: str = ""


class FakeHosts:
    """The engine.adapter_loads.AdapterHosts of a test. A path that begins with "bad" cannot be read."""

    def __init__(self, looks: int = 2, limit: int = 3):
        """`looks`: how often one must look at an adapter until it is read; `limit`: adapters that there is room for."""
        self._looks, self._limit = looks, limit
        self.copies: OrderedDict[str, int] = OrderedDict()  # looks that are left, by source
        self.num_fetched = 0

    def fetch_adapter(self, source: str) -> None:
        if source not in self.copies:
            self.num_fetched += 1
            read = [each for each, looks in self.copies.items() if looks <= 0]
            for each in read[: max(len(self.copies) + 1 - self._limit, 0)]:
                del self.copies[each]
            self.copies[source] = self._looks

    def find_adapter(self, source: str) -> FakeCopy | None:
        if source not in self.copies:
            return None
        self.copies[source] -= 1
        if self.copies[source] > 0:
            return None
        number, _, path = source.partition(" ")
        return FakeCopy(error=f"{path} is bad") if path.startswith("bad") else FakeCopy(rank=int(number))

    def promise_adapter(self, source: str) -> None:
        assert source in self.copies

    def release_adapter(self, source: str) -> None: ...

    def drop_adapter(self, source: str) -> None:
        self.copies.pop(source, None)
