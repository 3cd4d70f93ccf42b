"""Comments that keep a stream's connection open while it has no events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.types import Message

from sgl_jax.engine.generation import Generation
from sgl_jax.server.sse import EventStream


def bodies(waits: Sequence[float], comment_every: float = 0.1) -> list[bytes]:
    """Stream an event after each of the waits, in seconds; the last one fails. Return what was sent."""
    sent: list[bytes] = []

    async def events() -> AsyncIterator[bytes]:
        for i, seconds in enumerate(waits):
            await asyncio.sleep(seconds)
            yield b"data: %d\n\n" % i
        raise RuntimeError("no more")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        generation = Generation([], True, lambda keys, outcome: None)
        await EventStream(generation, events(), comment_every)({"type": "http", "path": "/generate"}, receive, send)
        await asyncio.sleep(2 * comment_every)  # nothing comes after the end

    asyncio.run(main())
    assert sent.pop() == b""
    assert sent.pop().startswith(b'data: {"error":')
    return sent


def test_comments_come_while_a_stream_waits_and_not_between_events() -> None:
    sent = bodies([0.35, 0.0, 0.01, 0.01, 0.35])
    assert sent == [b": waiting\n\n"] * 3 + [b"data: %d\n\n" % i for i in range(4)] + sent[7:-1] + [b"data: 4\n\n"]
    assert set(sent[7:-1]) == {b": waiting\n\n"}


def test_a_stream_with_a_steady_flow_has_no_comment() -> None:
    assert bodies([0.02] * 20) == [b"data: %d\n\n" % i for i in range(20)]
