"""Length of the queue of choices without a token, and the time until it is empty."""

import collections
import math
import time

_MEMORY = 256  # departures from which the rate is measured
_LONGEST = 60  # seconds; clients should look again after so long


class WaitingQueue:
    def __init__(self) -> None:
        self.length = 0
        # When choices left, latest last; before the first of them, when the queue began to fill.
        self._left: collections.deque[float] = collections.deque(maxlen=_MEMORY)

    def join(self, count: int) -> None:
        if self.length == 0:
            self._left.clear()
            self._left.append(time.perf_counter())
        self.length += count

    def leave(self, count: int = 1, *, served: bool = True) -> None:
        """Take choices out; those that were not `served`, but ended, say nothing about the throughput."""
        self.length -= count
        if served:
            self._left.extend([time.perf_counter()] * count)

    def seconds_to_empty(self) -> int:
        """Estimate from length and throughput in how many whole seconds the queue is empty; at least 1, at most 60."""
        if not self._left:
            return 1
        each = (time.perf_counter() - self._left[0]) / max(len(self._left) - 1, 1)
        return max(1, min(math.ceil(self.length * each), _LONGEST))
