"""The bytes of OpenAI's streams. Only what changes from chunk to chunk is encoded anew."""

from __future__ import annotations

import msgspec

from sgl_jax.server.responses import ChatLogprobs, CompletionLogprobs, Usage

_encode = msgspec.json.encode

type Logprobs = ChatLogprobs | CompletionLogprobs | None


class ChunkWriter:
    """Chunks of one response: `{"id", "object", "created", "model", "choices": [...]}` as server-sent events."""

    def __init__(self, id: str, object: str, created: int, model: str, include_usage: bool):
        head = _encode({"id": id, "object": object, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def _chunk(self, index: int, payload: bytes, logprobs: Logprobs, finish_reason: str | None) -> bytes:
        scores = b"null" if logprobs is None else _encode(logprobs)
        finish = b"null" if finish_reason is None else _encode(finish_reason)
        return (
            self._head
            + b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}' % (index, payload, scores, finish)
            + self._tail
        )

    def role(self, index: int) -> bytes:
        return self._chunk(index, b'"delta":{"role":"assistant","content":""}', None, None)

    def delta(self, index: int, text: str, logprobs: Logprobs = None) -> bytes:
        return self._chunk(index, b'"delta":{"content":' + _encode(text) + b"}", logprobs, None)

    def delta_end(self, index: int, finish_reason: str) -> bytes:
        return self._chunk(index, b'"delta":{}', None, finish_reason)

    def text(self, index: int, text: str, logprobs: Logprobs = None, finish_reason: str | None = None) -> bytes:
        return self._chunk(index, b'"text":' + _encode(text), logprobs, finish_reason)

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"
