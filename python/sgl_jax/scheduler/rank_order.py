"""On which data rank a request runs: pure functions that order the ranks, the preferred first.

The scheduler takes the first rank of that order with room for the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class RankLoads:
    """Loads that a placement may look at: one number a rank."""

    num_running: Sequence[int]
    num_available_pages: Sequence[int]  # free ones, and those of prefixes nobody uses


# A step lasts as long as that of its fullest rank, so a prefix is worth only so much more of a queue: beyond these many
# times the requests of the emptiest rank, and so many more, a rank is taken last.
_TIMES, _MORE = 2, 8

type NumCached = Callable[[int], int]  # the request's cached tokens on a rank; asked by who needs it
type Placement = Callable[[int, RankLoads, NumCached], list[int]]


def round_robin(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """In turn, by the request's number of arrival: a preempted request returns to its rank if that has room."""
    num_ranks = len(loads.num_running)
    return [(arrival + i) % num_ranks for i in range(num_ranks)]


def fewest_running(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """Fewest running requests, then most available pages, then the lowest rank."""
    ranks = range(len(loads.num_running))
    return sorted(ranks, key=lambda r: (loads.num_running[r], -loads.num_available_pages[r]))


def cache_aware(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """The longest cached prefix of the request, on ranks that do not run far more than the emptiest; between equals as
    fewest_running."""
    most = _TIMES * min(loads.num_running) + _MORE
    return sorted(
        fewest_running(arrival, loads, num_cached), key=lambda r: (loads.num_running[r] > most, -num_cached(r))
    )


PLACEMENTS: dict[str, Placement] = {
    "round_robin": round_robin,
    "fewest_running": fewest_running,
    "cache_aware": cache_aware,
}
