"""Server-sent events, and clients that go away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sgl_jax.engine.generation import Generation
from sgl_jax.server.app_state import json_response
from sgl_jax.server.error_envelope import ApiError, answer_to

DONE = b"data: [DONE]\n\n"
_WAITING = b": waiting\n\n"  # a comment, which clients skip
_COMMENT_EVERY_S = 5.0  # proxies often close a connection on which nothing came for 30 or 60 s


def event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """Sends the events of a generation as they come, and aborts the generation when the client goes away.

    While there are none, as in a queue or a long prefill, it sends a comment every `comment_every` seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes], comment_every: float = _COMMENT_EVERY_S):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._events = generation, events
        self._comment_every, self._num_sent = comment_every, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _until_disconnect(receive, self._send_all(scope, send))
        finally:
            self._generation.abort()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        commenting = asyncio.ensure_future(self._comment(send))
        try:
            async for data in self._events:
                self._num_sent += 1
                await send(_body(data))
        except Exception as error:  # the status line has been sent, so the error can only be the last event
            await send(_body(_error_event(answer_to(error, "a stream"), scope)))
        finally:
            commenting.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        while True:
            num_sent = self._num_sent
            await asyncio.sleep(self._comment_every)
            if self._num_sent == num_sent:
                await send(_body(_WAITING))


def _error_event(error: ApiError, scope: Scope) -> bytes:
    content = error.content(scope)
    name = (
        b"event: error\n" if content.startswith(b'{"type":"error"') else b""
    )  # as Anthropic's clients tell events apart
    return name + b"data: " + content + b"\n\n"


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def json_unless_disconnected(request: Request, work: Coroutine[Any, Any, object]) -> Response:
    """Answer with the result of `work`, which is cancelled when the client goes away; nobody reads the answer then."""
    if (found := await _until_disconnect(request.receive, work)) is None:
        return ApiError(499, "the client closed the connection", code="client_closed").response()
    return json_response(found)


async def _until_disconnect[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
