"""One chat of a program, with the body and the answer of POST /v1/chat/completions."""

import json
from collections.abc import AsyncIterator, Mapping

import msgspec
import pydantic
from fastapi.exceptions import RequestValidationError

from sgl_jax.request import InvalidParameter, Json
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.error_envelope import ApiError, answer_to
from sgl_jax.server.openai_chat import ChatAnswer, submitted
from sgl_jax.server.openai_types import ChatCompletionRequest


class ChatCall:
    def __init__(self, state: ServerState, body: Mapping[str, Json]):
        """Check the body. Raises InvalidParameter."""
        self._state = state
        try:
            self._body = ChatCompletionRequest.model_validate(body)
        except pydantic.ValidationError as error:
            found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise _refusal(answer_to(RequestValidationError(found, body=body), "a chat")) from None

    async def answer(self) -> dict[str, Json]:
        return msgspec.to_builtins(await (await self._submitted()).whole())

    async def chunks(self) -> AsyncIterator[dict[str, Json]]:
        async for events in (await self._submitted()).events():
            for event in events.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    yield json.loads(event.removeprefix(b"data: "))

    async def _submitted(self) -> ChatAnswer:
        try:
            return await submitted(self._state, self._body)
        except ApiError as error:
            raise _refusal(error) from None


def _refusal(error: ApiError) -> InvalidParameter:
    said = error.body.error
    return InvalidParameter(said.param or "messages", said.message)
