"""Slots of the device for adapters: which adapter is in each, who uses it, and whose turn is next.

A request can run once its adapter is in a slot. A slot without running requests takes another adapter, the least recently
used first. A waiting request without a slot lets others pass. After MOST_PASSED of them it claims a slot: requests for
the adapter in there then wait, until those that run have ended and the claimant's adapter can take the place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from sgl_jax.request import Request
from sgl_jax.step_plan import AdapterLoad

MOST_PASSED = 32
_NOBODY = 0  # no request has this key


@dataclasses.dataclass(slots=True)
class _Slot:
    number: int
    adapter: int = 0  # 0: none
    is_loaded: bool = False  # it is on the device, or in the plan that puts it there
    num_users: int = 0  # running requests
    last_used: int = 0
    claimed_by: int = _NOBODY  # key of the waiting request that the slot is kept for

    def may_be_taken_by(self, key: int) -> bool:
        return self.num_users == 0 and self.claimed_by in (_NOBODY, key)


class AdapterSlots:
    def __init__(
        self,
        number: int = 0,
        prepare: Callable[[int], str | None] = lambda adapter: None,
        release: Callable[[int], None] = lambda adapter: None,
    ):
        """`prepare` returns the source of an adapter that can be put into a slot now; otherwise it begins to read it and
        returns None. `release` is told of an adapter that was prepared and is not needed."""
        self._slots = [_Slot(i) for i in range(number)]
        self._of: dict[int, _Slot] = {}  # by adapter
        self._prepare, self._release = prepare, release
        self._pinned: set[int] = set()
        self._sources: dict[int, str] = {}  # where adapters that are ready to be loaded come from
        self._clock = itertools.count(1)
        self._num_seated = 0
        self._refused_at: dict[int, int] = {}  # by key of a request that waits for a slot: requests seated before
        self.num_loads = 0

    @property
    def num_used(self) -> int:
        """Slots with an adapter that is on the device."""
        return sum(slot.is_loaded for slot in self._slots)

    def admits(self, request: Request) -> bool:
        """Return whether the request's adapter is in a slot, or ready to be put into one that is kept for it."""
        if not request.adapter:
            return True
        slot = self._of.get(request.adapter)
        if slot is None:
            slot = self._take(request)
        elif slot.claimed_by not in (_NOBODY, request.key) and slot.is_loaded:
            slot = None  # it is being left to another adapter
        if slot is None:
            self._pass(request)
            return False
        if slot.is_loaded:
            return True
        source = self._prepare(request.adapter)
        if source is None:
            return False
        self._sources[request.adapter] = source
        return True

    def seat(self, request: Request) -> tuple[int, AdapterLoad | None]:
        """Count a running request that `admits` has let pass. Return its Param.ADAPTER, and what has to be loaded for it."""
        if not request.adapter:
            return 0, None
        slot, load = self._of[request.adapter], None
        if not slot.is_loaded:
            load = AdapterLoad(slot.number, self._sources.pop(request.adapter))
            slot.is_loaded = True
            self.num_loads += 1
        slot.num_users += 1
        slot.last_used, slot.claimed_by = next(self._clock), _NOBODY
        self._num_seated += 1
        self._refused_at.pop(request.key, None)
        return slot.number + 1, load

    def leave(self, request: Request) -> None:
        """Count a request that runs no more."""
        if request.adapter:
            self._of[request.adapter].num_users -= 1

    def withdraw(self, request: Request) -> None:
        """Forget that a request waits."""
        self._refused_at.pop(request.key, None)
        for slot in self._slots if request.adapter else ():
            if slot.claimed_by == request.key:
                slot.claimed_by = _NOBODY

    def pin(self, adapter: int) -> None:
        """Keep the adapter in its slot from its first use on."""
        self._pinned.add(adapter)

    def forget(self, adapter: int) -> None:
        """Empty the slot of an adapter that no request uses."""
        self._pinned.discard(adapter)
        self._sources.pop(adapter, None)
        if (slot := self._of.pop(adapter, None)) is not None:
            assert slot.num_users == 0
            if not slot.is_loaded:
                self._release(adapter)
            slot.adapter, slot.is_loaded = 0, False

    def check_invariants(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless each slot counts the running requests that use it."""
        used = [request.adapter for request in running if request.adapter]
        for slot in self._slots:
            assert slot.num_users == (used.count(slot.adapter) if slot.adapter else 0)
            assert slot.is_loaded or slot.num_users == 0
        assert self._of == {slot.adapter: slot for slot in self._slots if slot.adapter}
        assert set(used) <= self._of.keys()

    def _take(self, request: Request) -> _Slot | None:
        """Give the request's adapter the slot that was used least recently, if there is one, and keep it for the request."""
        vacant = [s for s in self._slots if s.may_be_taken_by(request.key) and s.adapter not in self._pinned]
        if not vacant:
            return None
        slot = min(vacant, key=lambda s: (s.claimed_by == _NOBODY, s.adapter > 0, s.last_used))
        self.withdraw(request)
        if self._of.pop(slot.adapter, None) is not None and not slot.is_loaded:
            self._release(slot.adapter)
        self._of[request.adapter] = slot
        slot.adapter, slot.is_loaded, slot.claimed_by = request.adapter, False, request.key
        return slot

    def _pass(self, request: Request) -> None:
        """Note that others may pass the request. Once many have, claim the slot with the fewest users for it."""
        since = self._refused_at.setdefault(request.key, self._num_seated)
        if self._num_seated - since < MOST_PASSED or any(slot.claimed_by == request.key for slot in self._slots):
            return
        free = [s for s in self._slots if s.claimed_by == _NOBODY and s.adapter not in self._pinned]
        if free:
            min(free, key=lambda s: (s.num_users, s.last_used)).claimed_by = request.key
