"""Chats in a program. The server's code answers them; it is imported when the first one comes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sgl_jax.engine.engine import Engine
from sgl_jax.engine.native_call import Reply
from sgl_jax.request import Json

if TYPE_CHECKING:
    from sgl_jax.server.app_state import ServerState
    from sgl_jax.server.chat_call import ChatCall


class ChatEngine(Engine):
    """The engine with chats. It is `sgl_jax.Engine`."""

    def chat(
        self, messages: Sequence[Mapping[str, Json]], *, stream: bool = False, **fields: Json
    ) -> Reply | Iterator[Reply]:
        """Return the answer to a conversation as POST /v1/chat/completions gives it, with `stream` an iterator of its
        chunks. `fields` are the other fields of its body (tools, response_format, max_tokens, …). Raises
        InvalidParameter, or TemplateError for messages that the model's chat template refuses."""
        call = self._chat_call(messages, stream, fields)
        return self._iterate(call.chunks()) if stream else self._call(call.answer())

    async def async_chat(
        self, messages: Sequence[Mapping[str, Json]], *, stream: bool = False, **fields: Json
    ) -> Reply | AsyncIterator[Reply]:
        """Do as `chat` does, for asyncio and in any loop; with `stream` the awaited value is an async iterator."""
        call = self._chat_call(messages, stream, fields)
        return self._aiterate(call.chunks()) if stream else await asyncio.wrap_future(self._submit(call.answer()))

    def _chat_call(self, messages: Sequence[Mapping[str, Json]], stream: bool, fields: Mapping[str, Json]) -> ChatCall:
        from sgl_jax.server.chat_call import ChatCall

        return ChatCall(self._chat_state, {**fields, "messages": list(messages), "stream": stream})

    @functools.cached_property
    def _chat_state(self) -> ServerState:
        from sgl_jax.server.app_state import ServerState

        return ServerState(self._service, self.server_args)
