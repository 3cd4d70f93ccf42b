"""Copies of adapters in memory: how many there are, which make room, and what becomes of files that change."""

from __future__ import annotations

import dataclasses
import time
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
    rank: int = 4
    sites: frozenset = frozenset({"qkv"})
    num_matrices: int = 2

    def factors(self) -> dict:
        return {}


class Arrays:
    """The part of AdapterArrays that a store uses."""

    class slots:
        rank, sites = 8, ("qkv", "o")

    def pack(self, factors: dict) -> tuple[np.ndarray, ...]:
        return (np.zeros(3, np.float32),)


def make(files: dict[str, Files], limit: int = 2, agree: Callable[[int], int] = lambda value: value) -> AdapterCopies:
    def opened(path: str) -> Files:
        if path == "strange":
            raise KeyError("no such thing")
        return files[path]

    return AdapterCopies(AdapterStore(opened, Arrays(), limit), lambda *_: None, agree)


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
    copies.drop_adapter(source)
    assert found(copies, source_of(3, "a")).error == ""


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (Files("a", rank=16), "a has rank 16; --max-lora-rank is 8"),
        (Files("a", sites=frozenset({"qkv", "down"})), "a changes the products down … --lora-target-modules"),
    ],
)
def test_an_adapter_without_room_in_the_slots_is_refused(files: Files, reason: str) -> None:
    assert says(found(make({"a": files}), source_of(1, "a")).error, reason)


def test_an_error_that_nobody_thought_of_is_told_too() -> None:
    assert says(found(make({}), source_of(1, "strange")).error, "strange cannot be read: KeyError")


def test_an_adapter_is_used_only_where_every_host_has_it() -> None:
    copies = make({"a": Files("a")}, agree=lambda value: 0)
    assert says(found(copies, source_of(1, "a")).error, "another host")
