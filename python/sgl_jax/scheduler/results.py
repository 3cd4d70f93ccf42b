"""Processing of a step's tokens: they are appended to their rows, the rows' bounds are corrected, and requests end."""

import dataclasses

import numpy as np

from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.rows import RowTable
from sgl_jax.step_plan import Param, RowFlag, StepPlan, StepTokens


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """New tokens of a processed step, n in all, in order within each row."""

    keys: np.ndarray  # i64[n]
    tokens: np.ndarray  # i32[n]
    lines: np.ndarray  # i64[n] the line that sampled each, of the plan's S * W
    first: list[Request]  # requests that got their first token
    finished: list[tuple[Request, FinishReason]]
    scored: dict[int, Request]  # row of the plan -> request for whose tokens or prompt logprobs are wanted
    drafts: np.ndarray  # i64[rows with drafts, 3] key, verified and accepted drafts, also those behind the end


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """The n tokens that requests take from a step, of the rows given to take_tokens."""

    tokens: np.ndarray  # i32[n]
    of: np.ndarray | slice  # i64[n] the row that sampled each token, as an index into the given rows
    line: np.ndarray | int  # i64[n] the row's token, 0 .. W-1, after which it was sampled
    ends: list[tuple[int, FinishReason]]  # rows that end with this step, as ascending indices into the given rows


_NO_DRAFTS = np.empty((0, 3), np.int64)


def verified_drafts(plan: StepPlan, step: StepTokens, index: np.ndarray) -> np.ndarray:
    """Return StepResult.drafts of plan.rows[index]."""
    if plan.width == 1:
        return _NO_DRAFTS
    index = index[step.num_drafted[index] > 0]
    return np.stack([plan.keys[index], step.num_drafted[index], step.num_accepted[index] - 1], axis=1)


def scored_requests(t: RowTable, plan: StepPlan, alive: np.ndarray) -> dict[int, Request]:
    """Return the requests that ask for logprobs of this step, by row of the plan. `alive`: bool[S] rows that run still."""
    if not (plan.wants_logprobs or plan.wants_prompt_logprobs):
        return {}
    wanted = plan.params[:, Param.FLAGS] & (RowFlag.LOGPROBS | RowFlag.PROMPT_LOGPROBS) != 0
    found = ((int(i), t.requests[plan.rows[i]]) for i in np.flatnonzero(wanted & alive))
    return {i: request for i, request in found if request is not None}


def started_requests(t: RowTable, rows: np.ndarray) -> list[Request]:
    """Return the requests that get their first token on these rows, which sampled, and mark them as announced."""
    started = (t.requests[row] for row in rows[t.num_known[rows] == t.prompt_len[rows]])
    first = [request for request in started if request is not None and not request.announced]
    for request in first:
        request.announced = True
    return first


def take_tokens(t: RowTable, plan: StepPlan, step: StepTokens, index: np.ndarray) -> Taken:
    """Append the tokens that plan.rows[index] sampled, up to the one at which a request ends."""
    rows, tokens, gained = plan.rows[index], step.tokens[index], step.num_accepted[index]
    known = t.num_known[rows]
    if plan.width > 1:  # correct the bounds by the drafts that were rejected
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

    all_of_one = plan.width == 1 and gained.all()  # a request without output takes none
    of, line = (slice(None), 0) if all_of_one else np.nonzero(np.arange(plan.width) < gained[:, None])
    taken = tokens[of, line]
    t.tokens[rows[of], known[of] + line] = taken
    t.num_known[rows] = known + gained
    return Taken(taken, of, line, ends)


def _end(t: RowTable, row: int, tokens: np.ndarray) -> tuple[int, FinishReason | None]:
    """Return how many of a row's new tokens its request takes, and the reason if it ends with them."""
    room = int(t.max_total[row] - t.num_known[row])
    stops = np.flatnonzero(np.isin(tokens[:room], t.stop_ids[row]))
    if len(stops):
        return int(stops[0]) + 1, FinishReason("stop", int(tokens[stops[0]]))
    return (room, FinishReason("length")) if len(tokens) >= room else (len(tokens), None)
