"""Interface of the KV cache to the scheduler: pages to compute into, and cached prefixes.

Owners of a running request's pages, as half-open intervals of page indices:

    [0, handle.num_pages)            the prefix tree; the request's lock on the handle keeps them
    [handle.num_pages, num_pages)    the request, which must hand them over with `extend` or `free`

A page is the scratch page, free, the tree's or one request's, as `check_invariants` tests.
"""

import dataclasses

import numpy as np

from sgl_jax.cache.page_pool import SCRATCH_PAGE, PagePool
from sgl_jax.cache.radix_tree import Node, RadixTree


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Handle:
    """Cached prefix. The scheduler uses only its length and pages."""

    node: Node
    pages: np.ndarray  # i32[num_pages], from the first token on
    num_tokens: int

    @property
    def num_pages(self) -> int:
        return len(self.pages)


class PrefixCache:
    def __init__(self, num_pages: int, page_size: int, *, enabled: bool = True):
        """`num_pages` includes the scratch page. A disabled cache matches nothing and keeps nothing."""
        self.page_size = page_size
        self.enabled = enabled
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(page_size)

    @property
    def num_usable_pages(self) -> int:
        return self.pool.num_pages - 1

    @property
    def num_unused_pages(self) -> int:
        """Pages of cached prefixes that no request uses."""
        return self.tree.num_evictable_pages

    @property
    def num_available_pages(self) -> int:
        """Pages that `allocate` can hand out now, evictable ones included."""
        return self.pool.num_free + self.tree.num_evictable_pages

    def match(self, namespace: str, tokens: np.ndarray) -> Handle:
        """Find the longest cached prefix. Changes ages only; the handle is valid until the next `allocate` unless locked."""
        node = self.tree.match(namespace, tokens if self.enabled else tokens[:0])
        pages = np.concatenate([np.empty(0, np.int32), *[n.pages for n in node.path][::-1]])
        return Handle(node, pages, len(pages) * self.page_size)

    def num_cached(self, namespace: str, tokens: np.ndarray) -> int:
        """Count the tokens that `match` would find. Changes nothing, so that several caches can be asked and one used."""
        return self.tree.num_matched(namespace, tokens) * self.page_size if self.enabled else 0

    def lock(self, handle: Handle) -> None:
        """Keep the prefix until `unlock`. Locks are counted."""
        self.tree.lock(handle.node)

    def unlock(self, handle: Handle) -> None:
        self.tree.unlock(handle.node)

    def allocate(self, n: int) -> np.ndarray | None:
        """Take n pages, i32[n], which the caller owns. Evicts prefixes if it must. Returns None and changes nothing if even
        eviction does not yield enough."""
        missing = n - self.pool.num_free
        if missing > 0:
            if n > self.num_available_pages:
                return None
            self.pool.free(self.tree.evict(missing))
        return self.pool.allocate(n)

    def free(self, pages: np.ndarray) -> None:
        """Give back pages that the caller owns."""
        self.pool.free(pages)

    def extend(self, handle: Handle, tokens: np.ndarray, pages: np.ndarray) -> Handle:
        """Hand computed pages to the tree, unlock the old handle and return a locked one for all the tokens.

        tokens [n * page_size] begin with the handle's prefix, and pages [n] hold their KV; the caller owns
        [handle.num_pages, n) of them. Where the tree has got the same tokens from another request meanwhile, the caller's
        pages are freed and the result has the tree's: the caller must use `result.pages` from then on.
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
        """Evict every unlocked prefix; return how many pages became free."""
        pages = self.tree.evict(self.tree.num_evictable_pages)
        self.pool.free(pages)
        return len(pages)

    def drop(self, namespaces: str) -> int:
        """Drop all prefixes of the namespaces whose names begin so, none of which may be locked; return how many pages became
        free."""
        pages = self.tree.drop(namespaces)
        self.pool.free(pages)
        return len(pages)

    def check_invariants(self, owned: list[np.ndarray]) -> None:
        """Raise AssertionError unless every page has exactly one owner. `owned`: the pages of each request."""
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
