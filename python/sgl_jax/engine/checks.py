"""Checks of a request before it is sent to the engine: whether it can be honoured, and whether the queue has room."""

import dataclasses
import uuid
from collections.abc import Container, Sequence

import msgspec

from sgl_jax.engine.generation import DuplicateRequestId, GenerationRequest, PromptTooLong, QueueFull
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.engine.waiting_queue import WaitingQueue
from sgl_jax.request import InvalidParameter, Names
from sgl_jax.text.tokenizer import TextTooLong, Tokenizer, TokenizerError


def encoded(
    tokenizer: Tokenizer, text: str, name: str, context_length: int, add_special_tokens: bool = True
) -> list[int]:
    """Encode a prompt. Raises PromptTooLong, before all of it is encoded, if it is plainly longer than the context, and
    InvalidParameter for a text that is not valid Unicode."""
    try:
        return tokenizer.encode(text, add_special_tokens, context_length)
    except TextTooLong as error:
        raise PromptTooLong(name, f"the prompt is too long: {name} has {error}") from error
    except TokenizerError as error:
        raise InvalidParameter(name, f"{name}: {error}") from error


def checked(request: GenerationRequest, info: EngineInfo) -> GenerationRequest:
    """Return the request with max_tokens and an id, if it left them open.

    Raises InvalidParameter or PromptTooLong, with names as the request used them.
    """
    try:
        request.params.validate(info.vocab_size, request.in_range)
        if request.params.priority and not info.priority_sign:
            text = "{priority} is {value}; this server serves by arrival: start it with --schedule-policy priority"
            raise InvalidParameter("priority", text, value=request.params.priority)
        max_tokens = _max_tokens(request, info)
    except InvalidParameter as error:
        raise error.named(request.names) from None
    request_id = request.request_id or uuid.uuid4().hex
    params = msgspec.structs.replace(request.params, max_tokens=max_tokens)
    return dataclasses.replace(request, params=params, request_id=request_id, in_range=True)


def _max_tokens(request: GenerationRequest, info: EngineInfo) -> int:
    """Check the prompt and return how many tokens may follow it."""
    ids, asked = request.prompt_ids, request.params.max_tokens
    if not ids:
        raise InvalidParameter("prompt", "{prompt} is empty; at least {count} token is needed", count="one")
    limit = min(info.context_length, info.max_total_tokens)
    room, least = limit - len(ids), request.params.min_tokens
    if room < (1 if asked is None else asked):
        wanted = "output needs one" if asked is None else "{max_tokens} is {asked}"
        # Clients that shorten a conversation look for "prompt is too long" or "this model's maximum context length is".
        text = "the prompt is too long: it has {count} tokens and " + wanted
        text += "; this model's maximum context length is {limit} tokens, prompt and output together"
        if info.pooling is not None:
            text = (
                "the prompt is too long: it has {count} tokens; this model's maximum context length is {limit} tokens"
            )
        raise PromptTooLong("prompt", text, count=len(ids), asked=asked, limit=limit)
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        text = "{prompt} has token id {value}; the vocabulary is 0..{last}"
        raise InvalidParameter("prompt", text, value=wrong, last=info.vocab_size - 1)
    if asked is not None:
        return asked
    if least > room:
        text = "{min_tokens} is {value}; there is room for {room} tokens"
        raise InvalidParameter("min_tokens", text, value=least, room=room)
    return room if request.default_max_tokens is None else min(room, max(request.default_max_tokens, least))


def check_ids(requests: Sequence[GenerationRequest], running: Container[str]) -> None:
    """Raise DuplicateRequestId if two requests have the same id, or one has an id that is `running`."""
    if len({request.request_id for request in requests}) != len(requests):
        raise DuplicateRequestId("rid", "two requests have the same id")
    if taken := [request.request_id for request in requests if request.request_id in running]:
        raise DuplicateRequestId("rid", f"request id {taken[0]} belongs to a running request")


def check_room(
    num_prompts: int, num_choices: int, n: int, names: Names, queue: WaitingQueue, limit: int | None
) -> None:
    """Check that the choices of a call, at most `n` for each prompt, may join the queue; `limit` is
    --max-queued-requests.

    Raises QueueFull, or InvalidParameter if waiting would not help.
    """
    if limit is None or queue.length + num_choices <= limit:
        return
    most = f"the limit is {limit} (--max-queued-requests)"
    if num_choices <= limit:
        text = f"{queue.length} requests are waiting and {num_choices} came; {most}"
        raise QueueFull(text, queue.seconds_to_empty())
    if n > limit or num_prompts == 1:
        raise InvalidParameter("n", f"n is {n}; {most}")
    text = (
        "{prompt} has {count} prompts, with n {wanted} requests; "
        if n > 1
        else "{prompt}: {wanted} requests are needed; "
    )
    text += most
    raise InvalidParameter("prompt", text, count=num_prompts, wanted=num_choices).named(names)
