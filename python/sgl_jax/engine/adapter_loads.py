"""Adapters on the engine's side: from a command to load one, over its files, to the slot that requests wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from sgl_jax.engine.messages import AdapterInfo, AdapterLoaded, AdapterUnloaded, Event, Finished, LoadAdapter, Refused
from sgl_jax.request import FinishReason
from sgl_jax.runtime.adapter_source import source_of
from sgl_jax.scheduler.adapter_slots import AdapterSlots
from sgl_jax.scheduler.scheduler import Scheduler

_WAIT_S = 0.005  # between two looks at a file that is being read, at the start


class CopyOfAdapter(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def num_matrices(self) -> int: ...

    @property
    def error(self) -> str:
        """Why it cannot be used; empty: it can."""


class AdapterHosts(Protocol):
    """Copies of adapters in the memory of all hosts, as the engine needs them (runtime.adapter_copies). A source names a load."""

    def fetch_adapter(self, source: str) -> None:
        """Begin to read an adapter on every host, unless it is there."""

    def find_adapter(self, source: str) -> CopyOfAdapter | None:
        """Return an adapter that all hosts have read; None while one still reads, or where it made room for others."""

    def promise_adapter(self, source: str) -> None:
        """Keep an adapter that was found until it is put into a slot, or released."""

    def release_adapter(self, source: str) -> None: ...

    def drop_adapter(self, source: str) -> None: ...


class Adapters:
    """Adapters that are loaded or being loaded, by the numbers of their loads."""

    def __init__(self, hosts: AdapterHosts, num_slots: int):
        self.slots = AdapterSlots(num_slots, self._prepare, self._release)
        self._hosts, self._num_slots = hosts, num_slots
        self._num_loads = 0
        self._loading: dict[int, LoadAdapter] = {}
        self._loaded: dict[int, AdapterInfo] = {}
        self._unloading: dict[int, int] = {}  # call by number
        self._broken: dict[int, str] = {}  # the reason why an adapter could not be read again

    @property
    def has_work(self) -> bool:
        return bool(self._loading or self._unloading or self._broken)

    def load_now(self, name: str, path: str, pinned: bool) -> AdapterInfo:
        """Load an adapter before the engine serves. Raises ValueError."""
        number = self.load(LoadAdapter(0, name, path, pinned))
        while not (events := self._poll_loads()):
            time.sleep(_WAIT_S)
        if isinstance(refused := events[0], Refused):
            raise ValueError(f"--lora-paths: {refused.message}")
        return self._loaded[number]

    def load(self, command: LoadAdapter) -> int:
        """Begin to load an adapter. Return the number of the load."""
        self._num_loads += 1
        self._loading[self._num_loads] = command
        self._hosts.fetch_adapter(source_of(self._num_loads, command.path))
        return self._num_loads

    def unload(self, call: int, number: int) -> None:
        """Forget an adapter as soon as no request uses it."""
        self._unloading[number] = call

    def poll(self, scheduler: Scheduler) -> tuple[list[Event], list[Finished]]:
        """Return answers to commands that are carried out by now, and requests that ended for want of their adapter."""
        if not self.has_work:
            return [], []
        finished = []
        for number, reason in self._broken.items():
            keys = _users(scheduler, number)
            finished += [Finished(key, FinishReason("abort", message=reason)) for key in keys if scheduler.abort(key)]
        self._broken.clear()
        return self._poll_loads() + self._poll_unloads(scheduler), finished

    def _poll_loads(self) -> list[Event]:
        events: list[Event] = []
        for number, command in [*self._loading.items()]:
            source = source_of(number, command.path)
            self._hosts.fetch_adapter(source)  # again if others took its room
            if (read := self._hosts.find_adapter(source)) is None:
                continue
            del self._loading[number]
            error = read.error or self._no_room(command)
            if error:
                self._hosts.drop_adapter(source)
                events.append(Refused(command.call, error, "lora_path" if read.error else "pinned"))
                continue
            if command.pinned:
                self.slots.pin(number)
            about = command.name, command.path, read.rank, read.num_matrices, command.pinned
            self._loaded[number] = AdapterInfo(number, *about)
            events.append(AdapterLoaded(command.call, self._loaded[number]))
        return events

    def _no_room(self, command: LoadAdapter) -> str:
        num_pinned = sum(each.pinned and each.name != command.name for each in self._loaded.values())
        if not command.pinned or num_pinned + 1 < self._num_slots:
            return ""
        taken = f"{num_pinned} of {self._num_slots} slots are pinned and one must be left to other adapters"
        return f"{taken}; raise --max-loras-per-batch, or load it without pinned"

    def _poll_unloads(self, scheduler: Scheduler) -> list[Event]:
        events: list[Event] = []
        for number, call in [*self._unloading.items()]:
            if _users(scheduler, number):
                continue
            del self._unloading[number]
            self.slots.forget(number)
            if (info := self._loaded.pop(number, None)) is not None:
                self._hosts.drop_adapter(source_of(number, info.path))
            events.append(AdapterUnloaded(call, sum(cache.drop(f"{number} ") for cache in scheduler.caches)))
        return events

    def _prepare(self, number: int) -> str | None:
        """Return the source of an adapter that every host has in memory; otherwise have it read, and return None."""
        source = source_of(number, self._loaded[number].path)
        self._hosts.fetch_adapter(source)
        read = self._hosts.find_adapter(source)
        if read is not None and read.error:
            self._broken[number] = read.error
            return None
        if read is not None:
            self._hosts.promise_adapter(source)
        return source if read is not None else None

    def _release(self, number: int) -> None:
        if number in self._loaded:
            self._hosts.release_adapter(source_of(number, self._loaded[number].path))


def namespace_of(adapter: int, salt: str) -> str:
    """Return the namespace of cached prefixes: one for each load of an adapter and each salt."""
    return f"{adapter} {salt}" if adapter or salt else ""


def _users(scheduler: Scheduler, adapter: int) -> Sequence[int]:
    """Return the keys of an adapter's requests."""
    return [key for key, request in scheduler.requests.items() if request.adapter == adapter]
