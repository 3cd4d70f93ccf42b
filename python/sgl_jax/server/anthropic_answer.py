"""Answers of Anthropic's Messages API: blocks of content, whole or as events."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import NamedTuple

import msgspec

from sgl_jax.engine.generation import Generation
from sgl_jax.request import Json
from sgl_jax.server.anthropic_request import arguments_of
from sgl_jax.server.anthropic_types import (
    AnsweredBlock,
    AnsweredMessage,
    AnsweredText,
    AnsweredThinking,
    AnsweredToolUse,
    MessagesUsage,
    StopReason,
)
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.chat_choice import ChoiceReader
from sgl_jax.server.error_envelope import ApiError
from sgl_jax.server.openai_chat import ChatAnswer
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.scanner import AnswerFormat

type Event = dict[str, Json]

_STOPS: Mapping[str | None, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer(ChatAnswer):
    id_prefix = "msg"

    def __init__(
        self, state: ServerState, chat: ChatCompletionRequest, generation: Generation, form: AnswerFormat | None
    ):
        super().__init__(state, chat, generation, form)
        self.id = self.id.replace("-", "_")

    def events(self) -> AsyncIterator[bytes]:
        return self._lines(_Blocks(self._choices[0]))

    async def whole(self) -> AnsweredMessage:
        """Return the message that a stream's events add up to."""
        blocks, found = _Blocks(self._choices[0]), AnsweredMessage(self.id, self.model, [], self._counts())
        async for event in self._events(blocks):
            if isinstance(event, _End):
                found.stop_reason, found.stop_sequence = event.reason, event.matched
        found.content, found.usage = blocks.whole, self._counts()
        return found

    async def _lines(self, blocks: "_Blocks") -> AsyncIterator[bytes]:
        async for event in self._events(blocks):
            if not isinstance(event, _End):
                yield _line(event)
                continue
            stop: Event = {"stop_reason": event.reason, "stop_sequence": event.matched}
            yield _line({"type": "message_delta", "delta": stop, "usage": msgspec.to_builtins(self._counts())})
            yield _line({"type": "message_stop"})

    def _counts(self) -> MessagesUsage:
        usage = self.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)

    async def _events(self, blocks: "_Blocks") -> AsyncIterator["Event | _End"]:
        """Yield the events of the message, and its end. Its begin says how much of the prompt was cached, which is known when
        the first token comes."""
        begun, finish, matched = False, None, None
        async for updates in self.generation.updates():
            for update in updates:
                news = self._news(update)
                if not begun:
                    begun = True
                    counts = msgspec.structs.replace(self._counts(), output_tokens=0)
                    message = AnsweredMessage(self.id, self.model, [], counts)
                    yield {"type": "message_start", "message": msgspec.to_builtins(message)}
                for part in blocks.choice.parts(news):
                    for event in blocks.events(part):
                        yield event
                if update.finish is not None:
                    finish = blocks.choice.finish_reason(news.finish)
                    matched = update.finish.matched if isinstance(update.finish.matched, str) else None
        for event in blocks.end():
            yield event
        if finish not in _STOPS:
            raise ApiError(
                500, "the request was ended before its answer was whole", type="server_error", code="aborted"
            )
        yield _End("stop_sequence", matched) if finish == "stop" and matched is not None else _End(_STOPS[finish], None)


class _End(NamedTuple):
    reason: StopReason
    matched: str | None  # the stop sequence


class _Blocks:
    """Blocks of a message, of which the last one may be open."""

    def __init__(self, choice: ChoiceReader) -> None:
        self.choice = choice
        self.whole: list[AnsweredBlock] = []
        self._is_open = False
        self._arguments = ""  # the last block's

    def events(self, part: Part) -> Iterator[Event]:
        """Yield the events of a part of the answer, and add it to the blocks."""
        match part:
            case Text(text):
                if not isinstance(block := self._last(), AnsweredText):
                    yield from self._begin(block := AnsweredText())
                yield self._delta("text_delta", text=text)
                block.text += text
            case Thought(text):
                if not isinstance(block := self._last(), AnsweredThinking):
                    yield from self._begin(block := AnsweredThinking())
                yield self._delta("thinking_delta", thinking=text)
                block.thinking += text
            case Call(name, call_id):
                yield from self._begin(AnsweredToolUse(self.choice.call_id(call_id), name, {}))
            case Arguments(text):
                yield self._delta("input_json_delta", partial_json=text)
                self._arguments += text

    def end(self) -> Iterator[Event]:
        """Yield the end of the open block, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        last = self.whole[-1]
        if isinstance(last, AnsweredThinking):
            yield self._delta("signature_delta", signature="")
        elif isinstance(last, AnsweredToolUse):
            last.input = arguments_of(self._arguments)
        yield {"type": "content_block_stop", "index": len(self.whole) - 1}

    def _last(self) -> AnsweredBlock | None:
        return self.whole[-1] if self._is_open else None

    def _begin(self, block: AnsweredBlock) -> Iterator[Event]:
        yield from self.end()
        self.whole.append(block)
        self._is_open, self._arguments = True, ""
        yield {"type": "content_block_start", "index": len(self.whole) - 1, "content_block": msgspec.to_builtins(block)}

    def _delta(self, kind: str, **fields: str) -> Event:
        return {"type": "content_block_delta", "index": len(self.whole) - 1, "delta": {"type": kind, **fields}}


def _line(event: Event) -> bytes:
    return f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
