"""Copies of adapters in memory: how many there are, which make room, and what becomes of files that change."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from messages import says
from sgl_jax.runtime.adapter_copies import AdapterCopies
from sgl_jax.runtime.adapter_source import source_of
from sgl_jax.runtime.adapter_store import AdapterCopy, AdapterStore


@dataclasses.dataclass
class Files:
    path: str
    fingerprint: str = "1"
    checksum: int = 7
    rank: int = 4
    num_matrices: int = 2

    def factors(self) -> dict:
        return {}


class Arrays:
    """The part of AdapterArrays that a store uses."""

    dtype = "bfloat16"

    def __init__(self) -> None:
        self.made: list[weakref.ref[np.ndarray]] = []
        self.value = 0.0

    def pack(self, factors: dict) -> tuple[np.ndarray, ...]:
        vector = np.full(3, self.value, np.float32)
        self.made.append(weakref.ref(vector))
        return (vector,)


def make(
    files: dict[str, Files],
    limit: int = 2,
    agree: Callable[[int], int] = lambda value: value,
    arrays: Arrays | None = None,
) -> AdapterCopies:
    def opened(path: str) -> Files:
        if path == "strange":
            raise KeyError("no such thing")
        return files[path]

    return AdapterCopies(AdapterStore(opened, arrays or Arrays()), limit, lambda *_: None, agree)


def found(copies: AdapterCopies, source: str) -> AdapterCopy:
    copies.fetch_adapter(source)
    for _ in range(1000):
        if (copy := copies.find_adapter(source)) is not None:
            return copy
        time.sleep(0.01)
    raise AssertionError("never read")


def test_the_least_recently_fetched_make_room() -> None:
    copies = make({name: Files(name) for name in "abc"})
    sources = [source_of(i, name) for i, name in enumerate("abc", 1)]
    for source in sources:
        assert found(copies, source).error == ""
    assert [copies.find_adapter(source) is not None for source in sources] == [False, True, True]


def test_those_that_are_read_at_once_do_not_push_each_other_out() -> None:
    copies = make({name: Files(name) for name in "abc"}, limit=1)
    sources = [source_of(i, name) for i, name in enumerate("abc", 1)]
    for source in sources:
        copies.fetch_adapter(source)
    assert [found(copies, source).num_matrices for source in sources] == [2, 2, 2]


def test_files_that_have_changed_are_not_read_as_the_old_load() -> None:
    files = {"a": Files("a"), "b": Files("b")}
    copies, source = make(files, limit=1), source_of(1, "a")
    assert found(copies, source).error == ""
    found(copies, source_of(2, "b"))
    files["a"] = Files("a", fingerprint="2")
    assert says(found(copies, source).error, "a have changed … load it again")
    assert says(found(copies, source).error, "a have changed")  # and still after others took its room
    copies.drop_adapter(source)
    assert found(copies, source_of(3, "a")).error == ""


def test_vectors_of_adapters_without_room_are_freed() -> None:
    arrays, names = Arrays(), [f"{i}" for i in range(20)]
    copies = make({name: Files(name) for name in names}, limit=3, arrays=arrays)
    for i, name in enumerate(names, 1):
        assert found(copies, source_of(i, name)).vectors == ()
    assert sum(each() is not None for each in arrays.made) == 3


def test_an_adapter_that_is_promised_to_a_slot_stays() -> None:
    copies = make({name: Files(name) for name in "abc"}, limit=1)
    first, *others = (source_of(i, name) for i, name in enumerate("abc", 1))
    found(copies, first)
    copies.promise_adapter(first)
    for source in others:
        found(copies, source)
    assert copies.find_adapter(first) is not None
    copies.release_adapter(first)
    found(copies, source_of(4, "b"))
    assert copies.find_adapter(first) is None


def test_values_that_the_slots_cannot_hold_are_refused() -> None:
    arrays = Arrays()
    arrays.value = np.inf
    assert says(found(make({"a": Files("a")}, arrays=arrays), source_of(1, "a")).error, "a … bfloat16 cannot hold")


def test_an_error_that_nobody_thought_of_is_told_too() -> None:
    assert says(found(make({}), source_of(1, "strange")).error, "strange cannot be read: KeyError")


@pytest.mark.parametrize("theirs", [0, 6, 8])
def test_an_adapter_is_used_only_where_every_host_has_the_same_files(theirs: int) -> None:
    copies = make({"a": Files("a")}, agree=lambda value: min(value, theirs if value > 0 else -theirs))
    assert says(found(copies, source_of(1, "a")).error, "a: another host")
    same = make({"a": Files("a")}, agree=lambda value: min(value, 7 if value > 0 else -7))
    assert found(same, source_of(1, "a")).error == ""
