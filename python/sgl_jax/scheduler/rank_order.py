"""Orders of the data ranks for a request, as pure functions. The scheduler takes the first rank with room for it."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class RankLoads:
    """Loads of the ranks, one number for each."""

    num_running: Sequence[int]
    num_available_pages: Sequence[int]  # free pages, and pages of cached prefixes without a user


# All ranks wait for the fullest one in each step, so a cached prefix is worth only a limited imbalance: a rank with more
# than _TIMES * (requests of the emptiest rank) + _MORE requests comes last.
_TIMES, _MORE = 2, 8

type NumCached = Callable[[int], int]  # rank -> the request's cached tokens there; a callable, since finding out costs
type RankOrder = Callable[[int, RankLoads, NumCached], list[int]]


def round_robin(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """Take turns by arrival number: a preempted request returns to its rank if that has room."""
    num_ranks = len(loads.num_running)
    return [(arrival + i) % num_ranks for i in range(num_ranks)]


def fewest_running(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """Prefer the fewest running requests, then the most available pages, then the lowest rank."""
    ranks = range(len(loads.num_running))
    return sorted(ranks, key=lambda r: (loads.num_running[r], -loads.num_available_pages[r]))


def cache_aware(arrival: int, loads: RankLoads, num_cached: NumCached) -> list[int]:
    """Prefer the longest cached prefix, on ranks that do not run far more than the emptiest; then as fewest_running."""
    ranks, most = fewest_running(arrival, loads, num_cached), _TIMES * min(loads.num_running) + _MORE
    return sorted(ranks, key=lambda r: (loads.num_running[r] > most, -num_cached(r)))


PLACEMENTS: dict[str, RankOrder] = {each.__name__: each for each in (round_robin, fewest_running, cache_aware)}
