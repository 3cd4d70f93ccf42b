"""Orders in which waiting requests are considered, as pure functions."""

from collections.abc import Iterable, Sequence

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.request import Request

_MAX_MATCHED = 128  # with more waiting requests, matching all of them costs more than it saves
_MAX_PASSED = 256  # later arrivals that may go first, so that a request without a cached prefix is served in the end


def fcfs(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """Sort by arrival: first come, first served. A preempted request keeps its arrival."""
    return sorted(waiting, key=lambda r: r.arrival)


def longest_prefix_match(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """Sort by cached tokens on the best rank, most first, so that a prefix is used before it is evicted; then by arrival.
    Requests that many later ones could have passed come before all others, by arrival."""
    waiting = list(waiting)
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, caches)

    def num_cached(request: Request) -> int:
        return max(cache.match(request.namespace, request.tokens[:-1]).num_tokens for cache in caches)

    first_to_pass = max((request.arrival for request in waiting), default=0) - _MAX_PASSED
    overdue = [request for request in waiting if request.arrival < first_to_pass]
    others = [request for request in waiting if request.arrival >= first_to_pass]
    return fcfs(overdue, caches) + sorted(others, key=lambda r: (-num_cached(r), r.arrival))


def most_urgent(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """Sort by priority, the most urgent first, then by arrival."""
    return sorted(waiting, key=lambda r: (-r.urgency, r.arrival))


POLICIES = {"fcfs": fcfs, "lpm": longest_prefix_match, "priority": most_urgent}
