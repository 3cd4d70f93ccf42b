"""The limits of a scheduler, and its policies by name."""

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits for each data rank. M ranks run M times as many requests, and tokens in a step."""

    max_running_requests: int
    context_length: int
    max_step_tokens: int  # token budget of a step, at least W for each running request
    max_prefill_tokens: int  # prompt tokens of a step
    policy: str = "fcfs"  # order of admission, --schedule-policy: scheduler.policy.POLICIES
    placement: str = "cache_aware"  # order of ranks, --dp-schedule-policy: scheduler.rank_order.PLACEMENTS
    width: Callable[[int], int] = lambda num_decoding: 1  # decoding rows of the fullest rank -> W of the step

    @functools.cached_property
    def max_width(self) -> int:
        return max(map(self.width, range(1, self.max_running_requests + 1)))
