"""The limits of a scheduler, and its policies by name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits for each data rank. M ranks run M times as many requests, and tokens in a step."""

    max_running_requests: int
    context_length: int
    max_step_tokens: int  # token budget of a step, at least W for each running request
    max_prefill_tokens: int  # prompt tokens of a step
    policy: str = "fcfs"  # order of admission, --schedule-policy: scheduler.policy.POLICIES
    placement: str = "cache_aware"  # order of ranks, --dp-schedule-policy: scheduler.rank_order.PLACEMENTS
    width: int = 1  # W, the tokens of a decoding row in a wide step
    wide_rows: int = 0  # rows of a rank up to which steps are wide
    draft_cost: float = 0.0  # scheduler.widths.Widths
    lookahead: int = 0  # tokens beyond a step's own whose KV a draft model writes
    keeps_tokens: bool = False  # the device holds each row's tokens, too
