"""Tests of the order of ranks for a request, for every placement."""

import pytest

from sgl_jax.scheduler.rank_order import PLACEMENTS, RankLoads

IDLE = RankLoads([0, 0, 0, 0], [9, 9, 9, 9])
BUSY = RankLoads([3, 1, 1, 2], [9, 4, 6, 9])


def order(policy: str, loads: RankLoads, cached: list[int], arrival: int = 0) -> list[int]:
    return PLACEMENTS[policy](arrival, loads, lambda rank: cached[rank])


@pytest.mark.parametrize(
    ("arrival", "expected"), [(0, [0, 1, 2, 3]), (1, [1, 2, 3, 0]), (6, [2, 3, 0, 1]), (7, [3, 0, 1, 2])]
)
def test_round_robin_goes_by_arrival_whatever_the_loads(arrival: int, expected: list[int]) -> None:
    assert order("round_robin", BUSY, [0, 0, 8, 0], arrival) == expected


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        (IDLE, [0, 1, 2, 3]),  # all equal: the lowest rank
        (BUSY, [2, 1, 3, 0]),  # ranks 1 and 2 run as many: the one with more pages
        (RankLoads([1, 1, 0, 1], [5, 7, 1, 7]), [2, 1, 3, 0]),
    ],
)
def test_fewest_running_then_most_pages_then_the_lowest(loads: RankLoads, expected: list[int]) -> None:
    assert order("fewest_running", loads, [0, 0, 0, 8], arrival=3) == expected


@pytest.mark.parametrize(
    ("loads", "cached", "expected"),
    [
        (IDLE, [0, 0, 0, 0], [0, 1, 2, 3]),
        (BUSY, [0, 0, 0, 0], [2, 1, 3, 0]),
        (BUSY, [8, 0, 0, 0], [0, 2, 1, 3]),  # a prefix counts more than a load
        (BUSY, [8, 0, 4, 12], [3, 0, 2, 1]),
        (BUSY, [8, 8, 8, 0], [2, 1, 0, 3]),
        (RankLoads([8, 0, 0, 0], [9, 9, 9, 9]), [8, 0, 0, 0], [0, 1, 2, 3]),
        (RankLoads([9, 0, 0, 0], [9, 9, 9, 9]), [8, 0, 0, 0], [1, 2, 3, 0]),  # but not more than idle ranks
        (RankLoads([16, 17, 4, 5], [9, 9, 9, 9]), [4, 8, 0, 0], [0, 2, 3, 1]),
    ],
)
def test_cache_aware_takes_the_longest_prefix_and_then_the_fewest_running(
    loads: RankLoads, cached: list[int], expected: list[int]
) -> None:
    assert order("cache_aware", loads, cached, arrival=3) == expected


@pytest.mark.parametrize("policy", PLACEMENTS)
def test_every_policy_names_every_rank_once(policy: str) -> None:
    assert sorted(order(policy, BUSY, [4, 0, 4, 0], arrival=5)) == [0, 1, 2, 3]
