"""Log probabilities of a step, by the requests that asked for them."""

import numpy as np

from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.request import Request
from sgl_jax.scheduler.results import StepResult
from sgl_jax.step_plan import Param, RowFlag, StepPlan, TokenScores


def scores_of_tokens(plan: StepPlan, step: StepResult, scores: TokenScores) -> dict[int, TokenLogprobs]:
    """Return the scores of the step's new tokens by their index, for the requests that asked for them."""
    found = {}
    for at, line in enumerate(step.lines.tolist()):
        if (request := step.scored.get(line // plan.width)) is not None and request.params.logprobs is not None:
            found[at] = _scores(scores, line, request.params.logprobs)
    return found


def gather_prompt_scores(plan: StepPlan, scored: dict[int, Request], scores: TokenScores) -> None:
    """Add the scores of prompt tokens to their requests. The line of a packed token scores the token after it."""
    ends = np.cumsum(plan.num_new)
    for row, request in scored.items():
        if not plan.params[row, Param.FLAGS] & RowFlag.PROMPT_LOGPROBS:
            continue
        if not request.prompt_logprobs:
            request.prompt_logprobs = [None] * len(request.prompt)
        num_new, position = int(plan.num_new[row]), int(plan.start[row]) + 1
        first = int(ends[row]) - num_new
        for i in range(min(num_new, len(request.prompt) - position)):
            request.prompt_logprobs[position + i] = _scores(scores, first + i, request.params.prompt_logprobs or 0)


def _scores(scores: TokenScores, i: int, num_top: int) -> TokenLogprobs:
    ids, logprobs = scores.top_ids[i, :num_top].tolist(), scores.top_logprobs[i, :num_top].tolist()
    return TokenLogprobs(float(scores.chosen[i]), ids, logprobs)
