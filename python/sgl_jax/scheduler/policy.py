"""The order in which waiting requests are considered: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.request import Request

_MAX_MATCHED = 128  # beyond this many waiting, matching each of them costs more than it saves


def fcfs(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """First come, first served; a preempted request keeps its place by arrival."""
    return sorted(waiting, key=lambda r: r.arrival)


def longest_prefix_match(waiting: Iterable[Request], caches: Sequence[PrefixCache]) -> list[Request]:
    """The requests with the most cached tokens on any rank first, so that a prefix is used before it is evicted; then by
    arrival."""
    waiting = list(waiting)
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, caches)

    def num_cached(request: Request) -> int:
        return max(cache.match(request.namespace, request.tokens[:-1]).num_tokens for cache in caches)

    return sorted(waiting, key=lambda r: (-num_cached(r), r.arrival))


POLICIES = {"fcfs": fcfs, "lpm": longest_prefix_match}
