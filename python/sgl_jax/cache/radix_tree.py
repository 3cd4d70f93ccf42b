"""Radix tree of token prefixes over the pages that hold their KV. Prefixes are shared by whole pages.

The edge to a node is a run of pages with their tokens, page_size for each page. A child is found by the tokens of its first
page. Each namespace has its own root, so prefixes are never shared between namespaces. A node that has become the only way
to its child is joined with it, so that a long conversation does not become a long path.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

_JOINED_GROWTH = 4  # a child joins a node that is at most this many times longer


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    tokens: np.ndarray  # i32[n * page_size]; empty at a root
    pages: np.ndarray  # i32[n]
    parent: Node | None
    namespace: str
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    num_locks: int = 0  # locks on this node and on those below it
    last_used: int = 0  # tree clock at the last match or insert that passed here
    offered: bool = False  # it has an entry in the tree's heap of leaves

    @property
    def path(self) -> Iterator[Node]:
        """This node, then its ancestors, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class RadixTree:
    def __init__(self, page_size: int):
        self.page_size = page_size
        self.num_pages = 0  # pages the tree owns
        self.num_locked_pages = 0  # owned pages that are locked
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last_used when offered, tiebreak, node)
        self._tiebreak = itertools.count()

    @property
    def num_evictable_pages(self) -> int:
        return self.num_pages - self.num_locked_pages

    def match(self, namespace: str, tokens: np.ndarray) -> Node:
        """Find the node that ends the longest cached prefix of whole pages, or a root if there is none.

        May split a node at the match, and refreshes the ages of the path. Valid until the tree next changes unless locked.
        """
        node = self._roots.get(namespace)
        if node is None:  # `insert` keeps the root: most namespaces never cache a page
            node = Node(np.empty(0, np.int32), np.empty(0, np.int32), None, namespace)
        node.last_used = now = next(self._clock)
        for child, num_pages in self._walk(node, tokens):
            node = child if num_pages == len(child.pages) else self._split(child, num_pages)
            node.last_used = now
        return node

    def num_matched(self, namespace: str, tokens: np.ndarray) -> int:
        """Count the whole pages that `match` would find. Changes nothing, ages included."""
        root = self._roots.get(namespace)
        return 0 if root is None else sum(num_pages for _, num_pages in self._walk(root, tokens))

    def insert(self, below: Node, tokens: np.ndarray, pages: np.ndarray) -> Node:
        """Add tokens below the node that `match` found for them; return the new node. The tree takes the pages, which must
        be whole."""
        if len(pages) == 0:
            return below
        if below.parent is None:
            assert self._roots.setdefault(below.namespace, below) is below, "match first"
        node = Node(tokens.copy(), pages.copy(), below, below.namespace, last_used=next(self._clock))
        below.children[self._key(tokens)] = node
        self.num_pages += len(pages)
        self._offer(node)
        self._join(below)
        return node

    def lock(self, node: Node) -> None:
        """Keep the node and its ancestors from eviction until `unlock`. Locks are counted."""
        for n in node.path:
            if n.num_locks == 0:
                self.num_locked_pages += len(n.pages)
            n.num_locks += 1

    def unlock(self, node: Node) -> None:
        for n in node.path:
            n.num_locks -= 1
            if n.num_locks == 0:
                self.num_locked_pages -= len(n.pages)
                self._offer(n)
        self._join(node)

    def evict(self, num_pages: int) -> np.ndarray:
        """Drop num_pages pages, or all unlocked ones if they are fewer, from the ends of the least recently used leaves; return
        them."""
        gathered: list[np.ndarray] = []
        count = 0
        while count < num_pages and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            node.offered = False
            if not self._is_evictable(node):
                continue  # offered again when its last lock or child goes
            if last_used != node.last_used:
                self._offer(node)
                continue
            num_kept = max(len(node.pages) - (num_pages - count), 0)
            gathered.append(node.pages[num_kept:])
            count += len(gathered[-1])
            if num_kept:
                node.tokens, node.pages = node.tokens[: num_kept * self.page_size], node.pages[:num_kept]
                self._offer(node)
            else:
                self._remove(node)
        self.num_pages -= count
        return np.concatenate(gathered) if gathered else np.empty(0, np.int32)

    def drop(self, namespaces: str) -> np.ndarray:
        """Drop the namespaces whose names begin so; return their pages. No node of them may be locked."""
        gone = [root for name, root in self._roots.items() if name.startswith(namespaces)]
        nodes = [*self._below(gone)]
        for node in nodes:
            assert node.num_locks == 0, "a request uses the prefix"
            node.parent = None  # so that its entry in the heap is passed over
        for root in gone:
            del self._roots[root.namespace]
        pages = np.concatenate([np.empty(0, np.int32), *[node.pages for node in nodes]])
        self.num_pages -= len(pages)
        return pages

    def nodes(self) -> Iterator[Node]:
        """Yield every node except the roots."""
        return self._below(self._roots.values())

    def _below(self, roots: Iterable[Node]) -> Iterator[Node]:
        stack = [child for root in roots for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _key(self, tokens: np.ndarray) -> bytes:
        return tokens[: self.page_size].tobytes()

    def _walk(self, node: Node, tokens: np.ndarray) -> Iterator[tuple[Node, int]]:
        """Yield the nodes below `node` that hold a prefix of tokens, and how many pages of each: all but in the last one."""
        is_whole = True
        while is_whole and (child := node.children.get(self._key(tokens))) is not None:
            n = min(len(child.tokens), len(tokens))
            different = np.flatnonzero(child.tokens[:n] != tokens[:n])
            num_pages = int(different[0] if len(different) else n) // self.page_size
            node, tokens = child, tokens[num_pages * self.page_size :]
            is_whole = num_pages == len(child.pages)  # before the caller splits the node
            yield child, num_pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Split a node after num_pages; return the upper part, a new node between the parent and the old node."""
        assert node.parent is not None
        cut = num_pages * self.page_size
        upper = Node(node.tokens[:cut], node.pages[:num_pages], node.parent, node.namespace)
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
        node.parent.children[self._key(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[num_pages:], upper
        upper.children[self._key(node.tokens)] = node
        return upper

    def _remove(self, node: Node) -> None:
        """Take a leaf out of the tree."""
        parent, node.parent = node.parent, None
        assert parent is not None
        del parent.children[self._key(node.tokens)]
        if parent.parent is not None:
            self._offer(parent)
            self._join(parent)
        elif not parent.children:
            self._roots.pop(parent.namespace, None)

    def _join(self, node: Node) -> None:
        """Put a node's pages in front of its only child's, if no lock ends at the node, and go on with its parent.

        A child much shorter than the node waits until it has grown: so a path of n equal inserts keeps O(log n) nodes, and
        a page is copied O(log n) times.
        """
        while node.parent is not None and len(node.children) == 1:
            parent, (child,) = node.parent, node.children.values()
            if child.num_locks != node.num_locks or _JOINED_GROWTH * len(child.pages) < len(node.pages):
                return
            child.tokens, child.pages = (
                np.concatenate([node.tokens, child.tokens]),
                np.concatenate([node.pages, child.pages]),
            )
            child.parent = parent
            parent.children[self._key(child.tokens)] = child
            node.parent, node = None, parent

    def _is_evictable(self, node: Node) -> bool:
        return node.parent is not None and node.num_locks == 0 and not node.children

    def _offer(self, node: Node) -> None:
        if self._is_evictable(node) and not node.offered:
            node.offered = True
            heapq.heappush(self._leaves, (node.last_used, next(self._tiebreak), node))
