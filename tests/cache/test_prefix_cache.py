"""Tests of the prefix cache: exact pages, and random sequences of calls against a brute-force model."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sgl_jax.cache.prefix_cache import Handle, PrefixCache


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def keep(cache: PrefixCache, *tokens: int, namespace: str = "") -> list[int]:
    """Put tokens into the cache, unlocked, as after computing them. Return their pages."""
    handle = cache.match(namespace, ids(*tokens))
    cache.lock(handle)
    pages = cache.allocate(len(tokens) // cache.page_size - handle.num_pages)
    assert pages is not None
    handle = cache.extend(handle, ids(*tokens), np.concatenate([handle.pages, pages]))
    cache.unlock(handle)
    return handle.pages.tolist()


def test_a_kept_prefix_is_matched_with_its_pages() -> None:
    cache = PrefixCache(8, 2)
    assert keep(cache, 1, 1, 2, 2) == [1, 2]
    handle = cache.match("", ids(1, 1, 2, 2, 3, 3))
    assert (handle.pages.tolist(), handle.num_pages, handle.num_tokens) == ([1, 2], 2, 4)
    assert keep(cache, 1, 1, 2, 2, 3, 3) == [1, 2, 3]
    assert cache.match("other", ids(1, 1)).num_tokens == 0
    cache.check_invariants([])


def test_extending_twice_with_the_same_tokens_frees_the_second_copy() -> None:
    cache = PrefixCache(8, 1)
    first, second = cache.match("", ids(1, 2, 3)), cache.match("", ids(1, 2, 3, 4))
    cache.lock(first)
    cache.lock(second)
    mine, theirs = cache.allocate(3), cache.allocate(4)
    assert mine is not None
    assert theirs is not None
    assert (mine.tolist(), theirs.tolist()) == ([1, 2, 3], [4, 5, 6, 7])
    first = cache.extend(first, ids(1, 2, 3), mine)
    second = cache.extend(second, ids(1, 2, 3, 4), theirs)
    assert second.pages.tolist() == [1, 2, 3, 7]
    assert sorted(cache.pool.free_pages().tolist()) == [4, 5, 6]
    cache.check_invariants([])
    cache.unlock(first)
    assert cache.flush() == 0  # the second handle holds the first's pages too
    cache.unlock(second)
    assert cache.flush() == 4
    assert cache.num_available_pages == cache.num_usable_pages == 7


def test_extending_part_of_what_one_owns_leaves_the_rest_to_the_caller() -> None:
    cache = PrefixCache(6, 2)
    handle = cache.match("", ids(1, 1))
    cache.lock(handle)
    pages = cache.allocate(3)
    assert pages is not None
    handle = cache.extend(handle, ids(1, 1, 2, 2), pages[:2])
    assert handle.pages.tolist() == [1, 2]
    cache.check_invariants([pages[2:]])
    with pytest.raises(AssertionError, match=r"5 .*6"):
        cache.check_invariants([])
    with pytest.raises(AssertionError, match="two owners"):
        cache.check_invariants([pages[:1]])


def test_allocate_evicts_only_what_is_missing_and_the_oldest_first() -> None:
    cache = PrefixCache(6, 1)
    keep(cache, 1)
    keep(cache, 2)
    keep(cache, 3)
    cache.match("", ids(1))
    pages = cache.allocate(3)
    assert pages is not None
    assert pages.tolist() == [2, 4, 5]
    assert [cache.match("", ids(t)).num_pages for t in (1, 2, 3)] == [1, 0, 1]
    cache.check_invariants([pages])


def test_allocating_more_than_there_is_changes_nothing() -> None:
    cache = PrefixCache(5, 1)
    keep(cache, 1, 2)
    handle = cache.match("", ids(1))
    cache.lock(handle)
    assert cache.num_available_pages == 3
    assert cache.allocate(4) is None
    assert cache.match("", ids(1, 2)).num_pages == 2
    pages = cache.allocate(3)
    assert pages is not None
    assert sorted(pages.tolist()) == [2, 3, 4]
    cache.unlock(handle)
    cache.free(pages)
    assert cache.num_available_pages == 4


def test_disabled_nothing_matches_and_nothing_is_kept() -> None:
    cache = PrefixCache(5, 1, enabled=False)
    handle = cache.match("", ids(1, 2))
    cache.lock(handle)
    pages = cache.allocate(2)
    assert pages is not None
    assert cache.extend(handle, ids(1, 2), pages) is handle
    assert cache.match("", ids(1, 2)).num_pages == 0
    assert cache.num_cached("", ids(1, 2)) == 0
    cache.check_invariants([pages])
    cache.free(pages)
    cache.unlock(handle)
    assert cache.num_available_pages == 4


class CacheMachine(RuleBasedStateMachine):
    """Requests that come, compute pages, hand them over and go. The model is a dictionary: (namespace, prefix) -> page and the
    time of its last use."""

    @initialize(page_size=st.sampled_from([1, 2, 4]), num_pages=st.integers(4, 20))
    def start(self, page_size: int, num_pages: int) -> None:
        self.cache = PrefixCache(num_pages, page_size)
        self.kept: dict[tuple[str, tuple[int, ...]], int] = {}
        self.used: dict[tuple[str, tuple[int, ...]], int] = {}
        self.now = 0
        self.requests: list[tuple[str, list[int], Handle, np.ndarray]] = []

    def prefixes(self, namespace: str, tokens: list[int]) -> list[tuple[str, tuple[int, ...]]]:
        size = self.cache.page_size
        return [(namespace, tuple(tokens[: i * size])) for i in range(1, len(tokens) // size + 1)]

    def matched(self, namespace: str, tokens: list[int]) -> list[int]:
        """Return the pages of the longest cached prefix, and count it as used."""
        self.now += 1
        pages = []
        for prefix in self.prefixes(namespace, tokens):
            if prefix not in self.kept:
                break
            pages.append(self.kept[prefix])
            self.used[prefix] = self.now
        return pages

    def locked(self) -> set[tuple[str, tuple[int, ...]]]:
        return {
            prefix
            for namespace, tokens, handle, _ in self.requests
            for prefix in self.prefixes(namespace, tokens)[: handle.num_pages]
        }

    def note_evictions(self, at_least: int) -> None:
        """Remove from the model the pages that the tree evicted, which must be unlocked, leaves first and oldest first."""
        in_tree = {int(page) for node in self.cache.tree.nodes() for page in node.pages}
        gone = {prefix for prefix, page in self.kept.items() if page not in in_tree}
        assert len(gone) >= at_least
        assert not gone & self.locked()
        stay = self.kept.keys() - gone
        size = self.cache.page_size
        for namespace, tokens in stay:
            assert len(tokens) == size or (namespace, tokens[:-size]) not in gone, "a child outlived its parent"
        inner = {(namespace, tokens[:-size]) for namespace, tokens in stay}
        could_have_gone = stay - inner - self.locked()
        if gone and could_have_gone:
            assert max(self.used[p] for p in gone) <= min(self.used[p] for p in could_have_gone)
        for prefix in gone:
            del self.kept[prefix], self.used[prefix]

    texts = st.lists(st.integers(0, 1), max_size=14)
    namespaces = st.sampled_from(["", "a"])

    @rule(namespace=namespaces, tokens=texts)
    def match(self, namespace: str, tokens: list[int]) -> None:
        num_cached = self.cache.num_cached(namespace, ids(*tokens))
        assert self.cache.match(namespace, ids(*tokens)).num_tokens == num_cached
        assert self.cache.match(namespace, ids(*tokens)).pages.tolist() == self.matched(namespace, tokens)

    @rule(namespace=namespaces, tokens=texts)
    def admit(self, namespace: str, tokens: list[int]) -> None:
        handle = self.cache.match(namespace, ids(*tokens))
        assert handle.pages.tolist() == self.matched(namespace, tokens)
        self.cache.lock(handle)
        self.requests.append((namespace, tokens, handle, handle.pages))
        need = len(tokens) // self.cache.page_size - handle.num_pages
        missing = need - self.cache.pool.num_free
        evictable = len(self.kept) - len(self.locked())
        pages = self.cache.allocate(need)
        if missing > evictable:
            assert pages is None
            self.requests.pop()
            self.cache.unlock(handle)
            return
        assert pages is not None
        assert len(pages) == need
        self.note_evictions(at_least=max(0, missing))
        self.requests[-1] = (namespace, tokens, handle, np.concatenate([handle.pages, pages]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.requests) - 1))
        namespace, tokens, handle, pages = self.requests[i]
        n = data.draw(st.integers(handle.num_pages, len(pages)))
        prefixes = self.prefixes(namespace, tokens)[:n]
        self.now += 1
        expected = [self.kept.get(prefix, int(page)) for prefix, page in zip(prefixes, pages, strict=False)]
        extended = self.cache.extend(handle, ids(*tokens[: n * self.cache.page_size]), pages[:n])
        assert extended.pages.tolist() == expected
        self.kept |= dict(zip(prefixes, expected, strict=True))
        self.used |= dict.fromkeys(prefixes, self.now)
        self.requests[i] = (namespace, tokens, extended, np.concatenate([extended.pages, pages[n:]]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        _, _, handle, pages = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.cache.free(pages[handle.num_pages :])
        self.cache.unlock(handle)

    @rule()
    def flush(self) -> None:
        evictable = len(self.kept) - len(self.locked())
        assert self.cache.flush() == evictable
        self.note_evictions(at_least=evictable)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants([pages[handle.num_pages :] for _, _, handle, pages in self.requests])
        assert {int(p) for n in self.cache.tree.nodes() for p in n.pages} == set(self.kept.values())
        assert self.cache.tree.num_locked_pages == len(self.locked())

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for _, _, handle, pages in self.requests:
            self.cache.free(pages[handle.num_pages :])
            self.cache.unlock(handle)
        assert self.cache.num_available_pages == self.cache.num_usable_pages
        self.cache.flush()
        assert self.cache.pool.num_free == self.cache.num_usable_pages


TestAnySequenceOfCalls = CacheMachine.TestCase
TestAnySequenceOfCalls.settings = settings(
    max_examples=300, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
