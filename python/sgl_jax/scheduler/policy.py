"""Orders in which waiting requests are considered, as pure functions."""

from collections.abc import Iterable, Sequence

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.request import Request

_MAX_MATCHED = 128  # with more waiting requests, matching all of them costs more than it saves


def fcfs(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """Sort by arrival: first come, first served. A preempted request keeps its arrival."""
    return sorted(waiting, key=lambda r: r.arrival)


def longest_prefix_match(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """Sort by cached tokens on the best rank, most first, so that a prefix is used before it is evicted; then by arrival."""
    waiting = list(waiting)
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, caches)

    def num_cached(request: Request) -> int:
        return max(cache.match(request.namespace, request.tokens[:-1]).num_tokens for cache in caches)

    return sorted(waiting, key=lambda r: (-num_cached(r), r.arrival))


POLICIES = {"fcfs": fcfs, "lpm": longest_prefix_match}
