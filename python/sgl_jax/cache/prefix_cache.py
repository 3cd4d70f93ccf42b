"""The scheduler's one door to the KV cache: pages to compute into, and prefixes that need no computing.

Who owns a running request's pages, as half-open intervals of page indices:

    [0, handle.num_pages)            the tree, kept by the request's lock on the handle
    [handle.num_pages, num_pages)    the request alone: it must hand them over with `extend` or `free`

Every page is the scratch page, free, the tree's, or one request's; `check_invariants` says so.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sgl_jax.cache.page_pool import SCRATCH_PAGE, PagePool
from sgl_jax.cache.radix_tree import Node, RadixTree


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Handle:
    """A cached prefix. Opaque to the scheduler but for its length and pages."""

    node: Node
    pages: np.ndarray  # i32[num_pages], from the first token on
    num_tokens: int

    @property
    def num_pages(self) -> int:
        return len(self.pages)


class PrefixCache:
    def __init__(self, num_pages: int, page_size: int, *, enabled: bool = True):
        """num_pages counts the scratch page. Disabled, nothing ever matches and nothing is kept."""
        self.page_size = page_size
        self.enabled = enabled
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(page_size)

    @property
    def num_usable_pages(self) -> int:
        return self.pool.num_pages - 1

    @property
    def num_unused_pages(self) -> int:
        """Pages that hold a cached prefix no request uses now."""
        return self.tree.num_evictable_pages

    @property
    def num_available_pages(self) -> int:
        """Pages `allocate` can hand out now, evicting what it must."""
        return self.pool.num_free + self.tree.num_evictable_pages

    def match(self, namespace: str, tokens: np.ndarray) -> Handle:
        """The longest cached prefix of tokens. Changes ages only; valid until the next `allocate` unless locked."""
        node = self.tree.match(namespace, tokens if self.enabled else tokens[:0])
        path = [n.pages for n in node.path][::-1]
        pages = np.concatenate(path) if path else np.empty(0, np.int32)
        return Handle(node, pages, len(pages) * self.page_size)

    def num_cached(self, namespace: str, tokens: np.ndarray) -> int:
        """How many tokens `match` would find. Changes nothing: for who asks several caches and uses one."""
        return self.tree.num_matched(namespace, tokens) * self.page_size if self.enabled else 0

    def lock(self, handle: Handle) -> None:
        """Keep the prefix until `unlock`. Locks count."""
        self.tree.lock(handle.node)

    def unlock(self, handle: Handle) -> None:
        self.tree.unlock(handle.node)

    def allocate(self, n: int) -> np.ndarray | None:
        """n pages for the caller to own, i32[n]; None, and nothing changed, when not even eviction yields them."""
        missing = n - self.pool.num_free
        if missing > 0:
            if n > self.num_available_pages:
                return None
            self.pool.free(self.tree.evict(missing))
        return self.pool.allocate(n)

    def free(self, pages: np.ndarray) -> None:
        """Give back pages the caller owns."""
        self.pool.free(pages)

    def extend(self, handle: Handle, tokens: np.ndarray, pages: np.ndarray) -> Handle:
        """Hand computed pages to the tree; returns a locked handle on all of tokens, and unlocks the old one.

        tokens [n * page_size] begins with the handle's prefix; pages [n] holds its KV, of which the caller owns
        [handle.num_pages, n). Where the tree meanwhile got the same prefix from someone else, the caller's copies are
        freed and the returned handle has the tree's pages instead: the caller must use `result.pages[:n]` from here on.
        """
        if not self.enabled:
            return handle
        found = self.match(handle.node.namespace, tokens)
        self.pool.free(pages[handle.num_pages : found.num_pages])
        node = self.tree.insert(found.node, tokens[found.num_tokens :], pages[found.num_pages :])
        extended = Handle(node, np.concatenate([found.pages, pages[found.num_pages :]]), len(tokens))
        self.lock(extended)
        self.unlock(handle)
        return extended

    def flush(self) -> int:
        """Evict every unlocked prefix; returns how many pages became free."""
        pages = self.tree.evict(self.tree.num_evictable_pages)
        self.pool.free(pages)
        return len(pages)

    def check_invariants(self, owned: list[np.ndarray]) -> None:
        """Raises AssertionError unless every page has exactly one owner. `owned`: each request's own pages."""
        in_tree = [n.pages for n in self.tree.nodes()]
        everything = np.concatenate([[SCRATCH_PAGE], self.pool.free_pages(), *in_tree, *owned]).astype(np.int64)
        assert len(everything) == self.pool.num_pages, f"{len(everything)} pages accounted of {self.pool.num_pages}"
        assert len(np.unique(everything)) == self.pool.num_pages, "a page has two owners"
        assert sum(map(len, in_tree)) == self.tree.num_pages
        locked = sum(len(n.pages) for n in self.tree.nodes() if n.num_locks)
        assert locked == self.tree.num_locked_pages, f"{locked} pages locked, counted {self.tree.num_locked_pages}"
        for node in self.tree.nodes():
            assert len(node.tokens) == len(node.pages) * self.page_size > 0
            assert node.num_locks >= sum(c.num_locks for c in node.children.values()), "a child outlocks its parent"
