"""What is refused before the engine hears of it: requests that cannot be honoured, and more than the queue holds."""

from __future__ import annotations

import uuid
from collections.abc import Container, Sequence

import msgspec

from sgl_jax.engine.generation import DuplicateRequestId, GenerationRequest, PromptTooLong, QueueFull
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.request import InvalidParameter


def checked(request: GenerationRequest, info: EngineInfo, running: Container[str]) -> GenerationRequest:
    """The request with max_tokens and an id, if it left them open. `running`: ids that are taken.

    Raises InvalidParameter, PromptTooLong or DuplicateRequestId.
    """
    params = request.params
    params.validate(info.vocab_size)
    field, ids = request.prompt_field, request.prompt_ids
    if not ids:
        raise InvalidParameter(field, f"{field} is empty; at least one token is needed")
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidParameter(field, f"{field} has token id {wrong}; the vocabulary is 0..{info.vocab_size - 1}")
    limit = min(info.context_length, info.max_total_tokens)
    room = limit - len(ids)
    asked = params.max_tokens
    if room < (asked or 1):
        wanted = "max_tokens is not set" if asked is None else f"max_tokens is {asked}"
        raise PromptTooLong(
            field, f"the prompt has {len(ids)} tokens and {wanted}; prompt and output together hold {limit} at most"
        )
    if asked is None:
        params = msgspec.structs.replace(params, max_tokens=room)
        if params.min_tokens > room:
            raise InvalidParameter("min_tokens", f"min_tokens is {params.min_tokens}; there is room for {room} tokens")
    request_id = request.request_id or uuid.uuid4().hex
    if request_id in running:
        raise DuplicateRequestId("rid", f"request id {request_id} belongs to a running request")
    return GenerationRequest(ids, params, request_id, request.namespace, field, request.score_only)


def check_queue(requests: Sequence[GenerationRequest], num_queued: int, limit: int | None) -> None:
    """Whether requests submitted together may join num_queued others; `limit` is --max-queued-requests.

    Raises QueueFull, InvalidParameter if waiting would not help, or DuplicateRequestId for an id that comes twice.
    """
    if len({request.request_id for request in requests}) != len(requests):
        raise DuplicateRequestId("rid", "two requests have the same id")
    if limit is None:
        return
    wanted = sum(request.params.n for request in requests)
    if wanted > limit:
        n, field = max(request.params.n for request in requests), requests[0].prompt_field
        if n > limit or len(requests) == 1:
            raise InvalidParameter("n", f"n is {n}; the limit is {limit} (--max-queued-requests)")
        raise InvalidParameter(
            field,
            f"{field} has {len(requests)} prompts, with n {wanted} requests; "
            f"the limit is {limit} (--max-queued-requests)",
        )
    if num_queued + wanted > limit:
        raise QueueFull(
            f"{num_queued} requests are waiting and {wanted} came; the limit is {limit} (--max-queued-requests)"
        )
