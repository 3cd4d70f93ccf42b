"""Taking a step's tokens into the rows that sampled them: bounds close in, tokens are appended, requests end."""

from __future__ import annotations

import dataclasses

import numpy as np

from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import StepPlan, StepTokens


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """The new tokens of a processed step: n of them, those of a row in order."""

    keys: np.ndarray  # i64[n]
    tokens: np.ndarray  # i32[n]
    lines: np.ndarray  # i64[n] where each was sampled, among the plan's S * W lines
    first: list[Request]  # requests that just got their first token
    finished: list[tuple[Request, FinishReason]]
    scored: dict[int, Request]  # by row of the plan, requests whose logprobs, or those of their prompts, were asked for


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """The tokens that requests take of a step: n of them, sampled by some of its rows."""

    tokens: np.ndarray  # i32[n]
    of: np.ndarray | slice  # i64[n] which of the rows sampled each
    line: np.ndarray | int  # i64[n] and after which of its W tokens
    ends: list[tuple[int, FinishReason]]  # which of the rows end with it, ascending


def take_tokens(t: RowTable, plan: StepPlan, step: StepTokens, index: np.ndarray) -> Taken:
    """Append what the rows at plan.rows[index] sampled to their tokens, up to the one at which a request ends."""
    rows, tokens, gained = plan.rows[index], step.tokens[index], step.num_accepted[index]
    known = t.num_known[rows]
    if plan.width > 1:  # the bounds close in on what the device accepted, from where it goes on
        rejected = np.where(plan.from_device[index], plan.width, 1) - gained
        t.num_sure[rows] += gained - 1
        t.num_tokens[rows] -= rejected
        t.num_computed[rows] -= rejected

    is_stop = t.stop_ids.take(rows, axis=0)[:, None] == tokens[:, :, None]  # [n, W, stop ids]
    at_stop = np.flatnonzero(is_stop) // (plan.width * t.stop_ids.shape[1])
    at_length = np.flatnonzero(known + gained >= t.max_total[rows])
    ends = []
    for i in sorted({*at_stop.tolist(), *at_length.tolist()}):
        gained[i], reason = _end(t, rows[i], tokens[i, : gained[i]])
        if reason is not None:
            ends.append((i, reason))

    of, line = (slice(None), 0) if plan.width == 1 else np.nonzero(np.arange(plan.width) < gained[:, None])
    taken = tokens[of, line]
    t.tokens[rows[of], known[of] + line] = taken
    t.num_known[rows] = known + gained
    return Taken(taken, of, line, ends)


def _end(t: RowTable, row: int, tokens: np.ndarray) -> tuple[int, FinishReason | None]:
    """How many of a row's new tokens its request takes, and why it ends with them, if it does."""
    room = int(t.max_total[row] - t.num_known[row])
    stops = np.flatnonzero(np.isin(tokens[:room], t.stop_ids[row]))
    if len(stops):
        return int(stops[0]) + 1, FinishReason("stop", int(tokens[stops[0]]))
    return (room, FinishReason("length")) if len(tokens) >= room else (len(tokens), None)
