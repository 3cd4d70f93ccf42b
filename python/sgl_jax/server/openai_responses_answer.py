"""Answers of OpenAI's Responses API: items of output, whole or as events."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec
from pydantic import TypeAdapter

from sgl_jax.engine.generation import Generation
from sgl_jax.request import Json
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.chat_choice import ChoiceReader
from sgl_jax.server.error_envelope import answer_to
from sgl_jax.server.openai_chat import ChatAnswer
from sgl_jax.server.openai_responses_request import Asked, listed, messages_of
from sgl_jax.server.openai_responses_types import ConversationItem
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.text.tool_calls.answer import Arguments, Call, Part, Text, Thought
from sgl_jax.text.tool_calls.scanner import AnswerFormat

type Event = dict[str, Json]
type Item = dict[str, Json]

_ECHOED = ("instructions", "max_output_tokens", "metadata", "previous_response_id", "temperature", "top_p", "user")
_STATUS: Mapping[str | None, str] = {"length": "incomplete", "abort": "cancelled", "failed": "failed"}
_ITEMS = TypeAdapter(list[ConversationItem])


class ResponseAnswer(ChatAnswer):
    def __init__(
        self,
        state: ServerState,
        chat: ChatCompletionRequest,
        generation: Generation,
        form: AnswerFormat | None,
        asked: Asked,
    ):
        super().__init__(state, chat, generation, form)
        self.id, self._asked = asked.id, asked
        self._items = _Items(self._choices[0])
        self._status = "in_progress"
        self._error: Json = None

    async def whole(self) -> Event:
        async for _ in self._events():
            pass
        return self._response()

    async def events(self) -> AsyncIterator[bytes]:
        number = 0
        async for event in self._events():
            data = msgspec.json.encode({**event, "sequence_number": number})
            yield f"event: {event['type']}\ndata: ".encode() + data + b"\n\n"
            number += 1

    async def _events(self) -> AsyncIterator[Event]:
        """Yield the events of the response, without their numbers. One that fails ends with an event, too."""
        final: Event | None = None
        stored = self._asked.body.store is not False
        self._asked.store.begin(self.id, self._response, listed(self._asked.input), stored)
        try:
            for name in ("created", "in_progress"):
                yield {"type": f"response.{name}", "response": self._response()}
            finish = None
            try:
                async for updates in self.generation.updates():
                    for update in updates:
                        news = self._news(update)
                        for part in self._items.choice.parts(news):
                            for event in self._items.events(part):
                                yield event
                        finish = self._items.choice.finish_reason(news.finish) or finish
            except Exception as error:
                if not self.stream:
                    raise
                said = answer_to(error, "a response").body.error
                finish, self._error = "failed", {"code": said.code or "server_error", "message": said.message}
            self._status = _STATUS.get(finish, "completed")
            for event in self._items.end("completed" if self._status == "completed" else "incomplete"):
                yield event
            final = self._response()
            self._keep(final)
            name = "incomplete" if self._status == "cancelled" else self._status
            yield {"type": f"response.{name}", "response": final}
        finally:
            self._asked.store.end(self.id, final)

    def _keep(self, response: Event) -> None:
        if self._error is not None:
            return
        items = _ITEMS.validate_python(self._items.whole)
        messages = [*self._asked.earlier, *messages_of(self._asked.input), *messages_of(items)]
        self._asked.store.keep(self.id, response, messages, items)

    def _response(self) -> Event:
        body = self._asked.body
        given = body.model_dump(exclude_none=True, by_alias=True)
        reason = {"incomplete": "max_output_tokens", "cancelled": "cancelled"}.get(self._status)
        found: Event = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "model": self.model,
            "output": list(self._items.whole),
            "error": self._error,
            "incomplete_details": {"reason": reason} if reason else None,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "text": {"format": {"type": "text"}} | given.get("text", {}),
            "reasoning": {"effort": None, "summary": None} | given.get("reasoning", {}),
            "truncation": "disabled",
            "background": False,
            "store": body.store is not False,
            **{name: given.get(name) for name in _ECHOED},
        }
        if self._status != "in_progress":
            usage = self.usage()
            thought = usage.completion_tokens_details
            found["completed_at"] = int(time.time())
            found["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {
                    "reasoning_tokens": 0 if thought is msgspec.UNSET else thought.reasoning_tokens
                },
                "total_tokens": usage.total_tokens,
            }
        else:
            found["usage"] = None
        return found


class _Items:
    """Items of a response's output, of which the last one may be open."""

    def __init__(self, choice: ChoiceReader) -> None:
        self.choice = choice
        self.whole: list[Item] = []
        self._is_open = False
        self._text = ""  # the last item's

    def events(self, part: Part) -> Iterator[Event]:
        """Yield the events of a part of the answer, and add it to the items."""
        match part:
            case Text(text):
                if self._kind() != "message":
                    yield from self._begin("message", "msg", role="assistant", content=[])
                    yield self._part_event("added", "")
                yield self._event("output_text.delta", content_index=0, delta=text, logprobs=[])
                self._text += text
            case Thought(text):
                if self._kind() != "reasoning":
                    yield from self._begin("reasoning", "rs", summary=[], content=[])
                    yield self._part_event("added", "")
                yield self._event("reasoning_text.delta", content_index=0, delta=text)
                self._text += text
            case Call(name, call_id):
                yield from self._begin(
                    "function_call", "fc", call_id=self.choice.call_id(call_id), name=name, arguments=""
                )
            case Arguments(text):
                yield self._event("function_call_arguments.delta", delta=text)
                self._text += text

    def end(self, status: str) -> Iterator[Event]:
        """Yield the end of the open item, if there is one."""
        if not self._is_open:
            return
        item, text = self.whole[-1], self._text
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                yield self._event("function_call_arguments.done", arguments=text, name=item["name"])
            case kind:
                item["content"] = [self._part(text)]
                is_text: Event = {"logprobs": []} if kind == "message" else {}
                name = "output_text" if kind == "message" else "reasoning_text"
                yield self._event(f"{name}.done", content_index=0, text=text, **is_text)
                yield self._part_event("done", text)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.whole) - 1, "item": dict(item)}
        self._is_open = False

    def _kind(self) -> Json:
        return self.whole[-1]["type"] if self._is_open else None

    def _begin(self, kind: str, prefix: str, **fields: Json) -> Iterator[Event]:
        yield from self.end("completed")
        item: Item = {"id": f"{prefix}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress", **fields}
        self.whole.append(item)
        self._is_open, self._text = True, ""
        yield {"type": "response.output_item.added", "output_index": len(self.whole) - 1, "item": dict(item)}

    def _part(self, text: str) -> Item:
        if self._kind() == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _part_event(self, name: str, text: str) -> Event:
        return self._event(f"content_part.{name}", content_index=0, part=self._part(text))

    def _event(self, event: str, /, **fields: Json) -> Event:
        where: Event = {"item_id": self.whole[-1]["id"], "output_index": len(self.whole) - 1}
        return {"type": f"response.{event}", **where, **fields}
