"""Tests of the free list, with exact page ids."""

import numpy as np
import pytest

from sgl_jax.cache.page_pool import SCRATCH_PAGE, PagePool


def test_the_lowest_ids_come_out_first_and_the_scratch_page_never() -> None:
    pool = PagePool(6)
    assert pool.num_free == 5
    assert pool.allocate(2).tolist() == [1, 2]
    assert pool.allocate(3).tolist() == [3, 4, 5]
    assert pool.num_free == 0
    assert SCRATCH_PAGE == 0


def test_freed_pages_come_out_next_in_the_order_they_were_freed() -> None:
    pool = PagePool(8)
    pool.allocate(5)
    pool.free(np.array([4, 2], np.int32))
    pool.free(np.array([1], np.int32))
    assert pool.num_free == 5
    assert pool.allocate(4).tolist() == [1, 4, 2, 6]
    assert pool.free_pages().tolist() == [7]


def test_asking_for_too_many_says_how_many_are_free_and_takes_none() -> None:
    pool = PagePool(5)
    pool.allocate(3)
    with pytest.raises(IndexError, match=r"2 pages.* 1 of 4"):
        pool.allocate(2)
    assert pool.allocate(1).tolist() == [4]


def test_an_allocation_is_the_callers_own_array() -> None:
    pool = PagePool(5)
    mine = pool.allocate(2)
    pool.free(mine)
    again = pool.allocate(2)
    mine[:] = 99
    assert again.tolist() == [1, 2]


def test_nothing_is_an_allocation_too() -> None:
    pool = PagePool(2)
    assert pool.allocate(0).tolist() == []
    pool.free(np.empty(0, np.int32))
    assert pool.num_free == 1


def test_freeing_more_pages_than_are_in_use_is_noticed() -> None:
    pool = PagePool(3)
    with pytest.raises(AssertionError, match=r"1 pages.* 0 "):
        pool.free(np.array([1], np.int32))
    assert pool.num_free == 2
