"""Checks of a request before it is sent to the engine: whether it can be honoured, and whether the queue has room."""

import dataclasses
import uuid
from collections.abc import Container, Sequence

import msgspec

from sgl_jax.engine.generation import DuplicateRequestId, GenerationRequest, PromptTooLong, QueueFull
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.request import InvalidParameter


def checked(request: GenerationRequest, info: EngineInfo, running: Container[str]) -> GenerationRequest:
    """Return the request with max_tokens and an id, if it left them open. `running` holds the ids that are taken.

    Raises InvalidParameter, PromptTooLong or DuplicateRequestId, with names as the request used them.
    """
    try:
        request.params.validate(info.vocab_size, request.in_range)
        max_tokens = _max_tokens(request, info)
    except InvalidParameter as error:
        raise error.named(request.names) from None
    request_id = request.request_id or uuid.uuid4().hex
    if request_id in running:
        raise DuplicateRequestId("rid", f"request id {request_id} belongs to a running request")
    params = msgspec.structs.replace(request.params, max_tokens=max_tokens)
    return dataclasses.replace(request, params=params, request_id=request_id, in_range=True)


def _max_tokens(request: GenerationRequest, info: EngineInfo) -> int:
    """Check the prompt and return how many tokens may follow it."""
    ids, asked = request.prompt_ids, request.params.max_tokens
    if not ids:
        raise InvalidParameter("prompt", "{prompt} is empty; at least {count} token is needed", count="one")
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        text = "{prompt} has token id {value}; the vocabulary is 0..{last}"
        raise InvalidParameter("prompt", text, value=wrong, last=info.vocab_size - 1)
    limit = min(info.context_length, info.max_total_tokens)
    room = limit - len(ids)
    if room < (asked or 1):
        wanted = "not set" if asked is None else asked
        text = (
            "the prompt has {count} tokens and {max_tokens} is {wanted}; "
            "prompt and output together hold {limit} at most"
        )
        raise PromptTooLong("prompt", text, count=len(ids), wanted=wanted, limit=limit)
    if asked is None and request.params.min_tokens > room:
        text = "{min_tokens} is {value}; there is room for {room} tokens"
        raise InvalidParameter("min_tokens", text, value=request.params.min_tokens, room=room)
    return room if asked is None else asked


def check_queue(requests: Sequence[GenerationRequest], num_queued: int, limit: int | None) -> None:
    """Check that requests submitted together may join num_queued others; `limit` is --max-queued-requests.

    Raises QueueFull, InvalidParameter if waiting would not help, or DuplicateRequestId if two have the same id.
    """
    if len({request.request_id for request in requests}) != len(requests):
        raise DuplicateRequestId("rid", "two requests have the same id")
    if limit is None:
        return
    wanted = sum(request.params.n for request in requests)
    if wanted > limit:
        n = max(request.params.n for request in requests)
        if n > limit or len(requests) == 1:
            raise InvalidParameter("n", f"n is {n}; the limit is {limit} (--max-queued-requests)")
        text = "{prompt} has {count} prompts, with n {wanted} requests; the limit is {limit} (--max-queued-requests)"
        error = InvalidParameter("prompt", text, count=len(requests), wanted=wanted, limit=limit)
        raise error.named(requests[0].names)
    if num_queued + wanted > limit:
        text = f"{num_queued} requests are waiting and {wanted} came; the limit is {limit} (--max-queued-requests)"
        raise QueueFull(text)
