"""Probabilities of tokens that a request names, after each of its items: /score with label_token_ids, as in SGLang.

A logprob is the model's own whatever bias a token has, so a token that a bias forces out tells its logprob exactly.
"""

import dataclasses
import math
from collections.abc import Sequence

import msgspec
from fastapi import Request

from sgl_jax.engine.generation import Conflict, GenerationRequest
from sgl_jax.engine.native_params import LOWEST_LOGPROB, finite
from sgl_jax.engine.slices import in_slices
from sgl_jax.request import MAX_LOGPROBS, InvalidParameter, SamplingParams
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.encoding_answers import LabelScores, VectorUsage
from sgl_jax.server.encoding_bodies import ScoreRequest

_OTHER_SIDES = ("text_1", "queries", "data_1", "text_2", "documents", "data_2", "instruction", "use_activation")
_FORCED = 100.0  # the greatest bias; a token that is not the best one even so has a probability below 1e-43, which counts as 0
_ONE_TOKEN = SamplingParams(
    max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS, ignore_eos=True, disable_speculation=True
)

type Scores = dict[int, float]  # by token


async def token_scores(state: ServerState, body: ScoreRequest, labels: Sequence[int], request: Request) -> LabelScores:
    """Return the probabilities of the labels after each item. Raises InvalidParameter."""
    state.service.check_ready()
    if (pooling := state.service.info.pooling) is not None:
        text = f"label_token_ids needs a launch with --task generate; this one has --task {pooling.kind}"
        raise InvalidParameter("label_token_ids", text)
    if label := next((each for each in labels if each >= state.service.info.vocab_size), None):
        last = state.service.info.vocab_size - 1
        raise InvalidParameter("label_token_ids", f"label_token_ids has {label}; the vocabulary is 0..{last}")
    prompts = await _prompts(state, body)
    found = await _logprobs(state, prompts, labels)
    num_tokens = sum(len(each.prompt_ids) for each in prompts)
    request.state.tokens, request.state.adapters = (
        (num_tokens, 0),
        [each.adapter for each in prompts[:1] if each.adapter],
    )
    rows = [[each[label] for label in labels] for each in found]
    scores = [_among_themselves(row) if body.apply_softmax else [math.exp(each) for each in row] for row in rows]
    return LabelScores(scores, body.model or state.model_name, VectorUsage(num_tokens, num_tokens))


async def _logprobs(state: ServerState, prompts: Sequence[GenerationRequest], labels: Sequence[int]) -> list[Scores]:
    """Return the labels' logprobs after each prompt. A request tells those of the best tokens and of the one that is forced;
    another one is sent for each label that is missing then."""
    found: list[Scores] = [{} for _ in prompts]
    wanted = [(i, labels[0]) for i in range(len(prompts))]
    while wanted:
        requests = [_forced(prompts[i], label) for i, label in wanted]
        generation = await state.service.submit(requests, stream=False)
        async for updates in generation.updates():
            for update in updates:
                i, label = wanted[update.prompt]
                if not update.logprobs:
                    raise Conflict(f"request {generation.requests[update.prompt].request_id} was aborted")
                score = update.logprobs[0]
                own = score.logprob if update.token_ids == [label] else LOWEST_LOGPROB
                best = dict(zip(score.top_ids, score.top_logprobs, strict=True)) | {label: own}
                found[i] |= {each: finite(best[each]) for each in labels if each in best}
        wanted = [(i, label) for i, each in enumerate(found) for label in dict.fromkeys(labels) if label not in each]
        if (limit := state.server_args.max_queued_requests) is not None:
            wanted = wanted[:limit]
    return found


def _forced(prompt: GenerationRequest, label: int) -> GenerationRequest:
    params = msgspec.structs.replace(prompt.params, logit_bias={label: _FORCED})
    return dataclasses.replace(prompt, params=params)


async def _prompts(state: ServerState, body: ScoreRequest) -> list[GenerationRequest]:
    """Return the query with each item as requests for a token."""
    for name in _OTHER_SIDES:
        if getattr(body, name) is not None:
            raise InvalidParameter(name, f"{name} cannot be had with label_token_ids, which needs query and items")
    query, items = body.query, body.items
    for name, value in (("query", query), ("items", items)):
        if value is None:
            raise InvalidParameter(name, f"{name} is missing; label_token_ids needs query and items")
    assert query is not None
    assert items is not None
    several = [items] if isinstance(items, str) else items
    state.service.check_count(len(several), 1, {"prompt": "items"})
    params = msgspec.structs.replace(_ONE_TOKEN, priority=body.priority or 0)
    adapter, namespace = state.adapter_of(body.model), body.cache_salt or ""
    found = []
    async for i, item in in_slices(enumerate(several)):
        name = "items" if isinstance(items, str) else f"items[{i}]"
        ids = await _joined(state, query, item, name, bool(body.item_first))
        found.append(GenerationRequest(ids, params, "", namespace, adapter, {"prompt": name}))
    return found


async def _joined(
    state: ServerState, query: str | list[int], item: str | list[int], name: str, item_first: bool
) -> list[int]:
    if isinstance(query, str) and isinstance(item, str):
        return await state.encode(item + query if item_first else query + item, name)
    if isinstance(query, str) or isinstance(item, str):
        raise InvalidParameter("query", "query and items must both be text, or both token ids")
    return [*item, *query] if item_first else [*query, *item]


def _among_themselves(logprobs: Sequence[float]) -> list[float]:
    best = max(logprobs)
    weights = [math.exp(each - best) for each in logprobs]
    total = sum(weights)
    return [each / total for each in weights]
