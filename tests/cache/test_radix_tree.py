"""Tests of the radix tree alone: matches, splits, locks and the order of eviction."""

import numpy as np
import pytest

from sgl_jax.cache.radix_tree import Node, RadixTree


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def put(tree: RadixTree, tokens: list[int], pages: list[int], namespace: str = "") -> Node:
    """Insert the tokens that the tree lacks; `pages` are the pages of these."""
    found = tree.match(namespace, ids(*tokens))
    num_cached = sum(len(n.pages) for n in found.path) * tree.page_size
    return tree.insert(found, ids(*tokens[num_cached:]), ids(*pages))


def pages_of(node: Node) -> list[int]:
    return [int(p) for n in reversed(list(node.path)) for p in n.pages]


def shape(tree: RadixTree, namespace: str = "") -> dict:
    """Return the tree as nested dictionaries: pages of an edge -> the tree below."""

    def below(node: Node) -> dict:
        return {tuple(child.pages.tolist()): below(child) for child in node.children.values()}

    return below(tree.match(namespace, ids()))


@pytest.fixture
def tree() -> RadixTree:
    """Make a tree of page size 2 with [1 1 2 2 3 3] on pages 11 12 13."""
    tree = RadixTree(2)
    put(tree, [1, 1, 2, 2, 3, 3], [11, 12, 13])
    return tree


@pytest.mark.parametrize(
    ("tokens", "pages"),
    [
        ([], []),
        ([1], []),
        ([1, 2], []),
        ([2, 2, 3, 3], []),
        ([1, 1], [11]),
        ([1, 1, 2], [11]),
        ([1, 1, 2, 9], [11]),
        ([1, 1, 2, 2], [11, 12]),
        ([1, 1, 2, 2, 3, 3], [11, 12, 13]),
        ([1, 1, 2, 2, 3, 3, 4, 4], [11, 12, 13]),
    ],
)
def test_match_finds_the_longest_prefix_of_whole_pages(tree: RadixTree, tokens: list[int], pages: list[int]) -> None:
    assert tree.num_matched("", ids(*tokens)) == len(pages)
    assert pages_of(tree.match("", ids(*tokens))) == pages


def test_counting_a_match_splits_nothing_and_refreshes_no_age(tree: RadixTree) -> None:
    put(tree, [5, 5], [21])
    assert tree.num_matched("", ids(1, 1, 2, 2)) == 2
    assert tree.num_matched("other", ids(1, 1, 2, 2)) == 0
    assert shape(tree) == {(11, 12, 13): {}, (21,): {}}
    assert tree.evict(1).tolist() == [13]  # still the oldest


def test_a_match_inside_an_edge_splits_it_and_keeps_its_content(tree: RadixTree) -> None:
    assert shape(tree) == {(11, 12, 13): {}}
    tree.match("", ids(1, 1, 9, 9))
    assert shape(tree) == {(11,): {(12, 13): {}}}
    assert pages_of(tree.match("", ids(1, 1, 2, 2, 3, 3))) == [11, 12, 13]
    assert tree.num_pages == 3


def test_insert_hangs_the_rest_below_the_shared_part(tree: RadixTree) -> None:
    put(tree, [1, 1, 2, 2, 7, 7, 8, 8], [21, 22])
    assert shape(tree) == {(11, 12): {(13,): {}, (21, 22): {}}}
    assert pages_of(tree.match("", ids(1, 1, 2, 2, 7, 7, 8, 8))) == [11, 12, 21, 22]
    assert tree.num_pages == 5


def test_inserting_nothing_changes_nothing(tree: RadixTree) -> None:
    node = tree.match("", ids(1, 1))
    assert tree.insert(node, ids(), ids()) is node
    assert tree.num_pages == 3


def test_namespaces_never_match_each_other(tree: RadixTree) -> None:
    assert pages_of(tree.match("other", ids(1, 1, 2, 2))) == []
    put(tree, [1, 1, 2, 2], [31, 32], namespace="other")
    assert pages_of(tree.match("other", ids(1, 1, 2, 2, 3, 3))) == [31, 32]
    assert pages_of(tree.match("", ids(1, 1, 2, 2, 3, 3))) == [11, 12, 13]


def test_a_namespace_that_holds_nothing_costs_nothing(tree: RadixTree) -> None:
    for i in range(100):
        tree.match(f"salt {i}", ids(1, 1))
    put(tree, [5, 5], [41], namespace="brief")
    tree.evict(4)
    assert list(tree._roots) == []


def test_evict_takes_the_least_recently_used_leaf_first() -> None:
    tree = RadixTree(1)
    put(tree, [1, 2], [1, 2])
    put(tree, [1, 3], [3])
    put(tree, [4], [4])
    tree.match("", ids(1, 2))  # leaves by age: 3, 4, 2; then 1, which has become a leaf
    assert [tree.evict(1).tolist() for _ in range(5)] == [[3], [4], [2], [1], []]
    assert tree.num_pages == 0


def test_a_use_between_two_evictions_counts() -> None:
    tree = RadixTree(1)
    for token in (1, 2, 3):
        put(tree, [token], [token])
    assert tree.evict(1).tolist() == [1]
    tree.match("", ids(2))
    assert tree.evict(1).tolist() == [3]


def test_evict_takes_no_more_than_is_asked_for_and_the_ends_of_prefixes_first() -> None:
    tree = RadixTree(1)
    put(tree, [1, 1, 1], [1, 2, 3])
    put(tree, [2], [4])
    put(tree, [3], [5])
    assert tree.evict(1).tolist() == [3]
    assert pages_of(tree.match("", ids(1, 1, 1))) == [1, 2]  # now the newest
    assert tree.evict(3).tolist() == [4, 5, 2]
    assert (tree.num_pages, tree.num_evictable_pages) == (1, 1)
    assert tree.evict(9).tolist() == [1]


def test_a_long_conversation_stays_a_short_path() -> None:
    """A turn is matched in time that does not grow with the number of turns before it."""
    tree, tokens = RadixTree(2), np.arange(2000, dtype=np.int32)
    for turn in range(1, 501):
        before, after = tree.match("", tokens[: 4 * turn - 4]), tokens[4 * turn - 4 : 4 * turn]
        tree.lock(before)
        node = tree.insert(before, after, ids(2 * turn - 1, 2 * turn))
        tree.lock(node)
        tree.unlock(before)
        tree.unlock(node)
        assert pages_of(tree.match("", tokens)) == list(range(1, 2 * turn + 1))
    assert len(list(tree.nodes())) <= 6
    assert (tree.num_pages, tree.num_locked_pages, tree.num_evictable_pages) == (1000, 0, 1000)


def test_nodes_are_joined_only_where_no_lock_ends(tree: RadixTree) -> None:
    upper = tree.match("", ids(1, 1, 2, 2, 3, 3))
    tree.lock(upper)
    lower = put(tree, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [14, 15])
    tree.lock(lower)
    assert shape(tree) == {(11, 12, 13): {(14, 15): {}}}
    tree.unlock(lower)
    assert shape(tree) == {(11, 12, 13): {(14, 15): {}}}
    assert tree.evict(9).tolist() == [14, 15]
    lower = put(tree, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], [14, 15])
    tree.lock(lower)
    tree.unlock(upper)
    assert shape(tree) == {(11, 12, 13, 14, 15): {}}
    assert (tree.num_locked_pages, tree.evict(9).tolist()) == (5, [])
    tree.unlock(lower)
    assert tree.evict(9).tolist() == [11, 12, 13, 14, 15]


def test_a_node_is_joined_with_the_one_child_that_eviction_leaves(tree: RadixTree) -> None:
    put(tree, [1, 1, 9, 9], [19])
    tree.match("", ids(1, 1, 2, 2, 3, 3))
    assert shape(tree) == {(11,): {(12, 13): {}, (19,): {}}}
    assert tree.evict(1).tolist() == [19]
    assert shape(tree) == {(11, 12, 13): {}}


def test_a_lock_keeps_a_node_and_its_ancestors_and_counts(tree: RadixTree) -> None:
    put(tree, [1, 1, 8, 8], [18])
    node = tree.match("", ids(1, 1, 2, 2))
    tree.lock(node)
    tree.lock(node)
    assert (tree.num_locked_pages, tree.num_evictable_pages) == (2, 2)
    assert sorted(tree.evict(9).tolist()) == [13, 18]
    tree.unlock(node)
    assert tree.evict(9).tolist() == []
    tree.unlock(node)
    assert tree.num_locked_pages == 0
    assert sorted(tree.evict(9).tolist()) == [11, 12]


def test_splitting_a_locked_node_keeps_both_parts_locked(tree: RadixTree) -> None:
    node = tree.match("", ids(1, 1, 2, 2, 3, 3))
    tree.lock(node)
    put(tree, [1, 1, 9, 9], [19])
    assert shape(tree) == {(11,): {(12, 13): {}, (19,): {}}}
    assert tree.num_locked_pages == 3
    assert tree.evict(9).tolist() == [19]
    tree.unlock(node)
    assert tree.num_locked_pages == 0
    assert sorted(tree.evict(9).tolist()) == [11, 12, 13]


def test_locking_the_root_keeps_nothing(tree: RadixTree) -> None:
    root = tree.match("", ids())
    tree.lock(root)
    assert sorted(tree.evict(9).tolist()) == [11, 12, 13]
    tree.unlock(root)


def test_memory_of_the_eviction_order_does_not_grow_with_use(tree: RadixTree) -> None:
    node = tree.match("", ids(1, 1, 2, 2, 3, 3))
    for _ in range(1000):
        tree.match("", ids(1, 1, 2, 2, 3, 3))
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._leaves) <= 3
    assert tree.evict(3).tolist() == [11, 12, 13]
