"""Requests of OpenAI's Responses API as chat completion requests."""

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from sgl_jax.request import InvalidParameter
from sgl_jax.server.chat_turns import Fields, merged
from sgl_jax.server.openai_responses_types import (
    AllowedFunctions,
    CallItem,
    CallOutputItem,
    ContentText,
    ConversationItem,
    InputMessage,
    NamedFunction,
    ReasoningItem,
    ResponsesRequest,
    ResponseTool,
    SchemaFormat,
)
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.stored_responses import StoredResponses

# By type, how ids of items begin, and fields that items have even when a request leaves them out.
_LISTED: Mapping[str, tuple[str, Fields]] = {
    "message": ("msg", {}),
    "function_call": ("fc", {}),
    "function_call_output": ("fco", {}),
    "reasoning": ("rs", {"summary": []}),
}


class Asked(NamedTuple):
    """A request, and where its response is kept."""

    id: str  # the response's
    body: ResponsesRequest
    input: str | list[ConversationItem]  # the body's, with the items that it refers to
    earlier: list[Fields]  # messages of the conversation before it
    store: StoredResponses


def as_chat(asked: Asked, thinks: bool) -> ChatCompletionRequest:
    """Return the chat that a request asks for. `thinks`: the model's answers have thoughts. Raises InvalidParameter."""
    body = asked.body
    system: list[Fields] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: Fields = {"model": body.model, "messages": merged([*system, *asked.earlier, *messages_of(asked.input)])}
    fields |= {"rid": asked.id, "max_tokens": body.max_output_tokens, "tool_choice": _choice(body)}
    fields |= {
        name: getattr(body, name) for name in ("temperature", "top_p", "priority", "stream", "parallel_tool_calls")
    }
    if body.tools:
        fields["tools"] = [_tool(each) for each in body.tools]
    if body.reasoning is not None and thinks:  # others keep to any effort
        fields["reasoning_effort"] = "xhigh" if body.reasoning.effort == "max" else body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        form = body.text.format
        given: Fields = {"schema": form.schema_} if isinstance(form, SchemaFormat) else {}
        fields["response_format"] = {"type": form.type, **({"json_schema": given} if given else {})}
    try:
        return ChatCompletionRequest.model_validate({name: v for name, v in fields.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidParameter("input", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def messages_of(given: str | Sequence[ConversationItem]) -> list[Fields]:
    """Return items as messages: a thought, a text and calls that follow each other are one answer."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    found: list[Fields] = []
    answer: Fields | None = None  # the last message, while items may belong to it
    for item in given:
        match item:
            case CallOutputItem():
                answer = None
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
                continue
            case InputMessage() if item.role != "assistant":
                answer = None
                found.append({"role": item.role, "content": _text(item.content)})
                continue
        begins = isinstance(item, ReasoningItem) or (
            isinstance(item, InputMessage) and answer is not None and "tool_calls" in answer
        )
        if answer is None or begins:
            answer = {"role": "assistant", "content": ""}
            found.append(answer)
        _add(answer, item)
    return found


def listed(given: str | Sequence[ConversationItem]) -> list[Fields]:
    """Return the items of an input as the API lists them, each with an id of its own: one that a client gave twice is
    replaced, as a list's next page begins behind an id."""
    items = [InputMessage(role="user", content=given)] if isinstance(given, str) else given
    found, seen = [], set[object]()
    for item in items:
        fields: Fields = item.model_dump(exclude_none=True)
        if isinstance(item, InputMessage):
            name = "output_text" if item.role == "assistant" else "input_text"
            fields["content"] = [
                {"type": name, "text": text} | ({"annotations": []} if item.role == "assistant" else {})
                for text in ([item.content] if isinstance(item.content, str) else (part.text for part in item.content))
            ]
        prefix, more = _LISTED[item.type]
        given_id = fields.pop("id", None)
        fields["id"] = given_id if given_id and given_id not in seen else f"{prefix}_{uuid.uuid4().hex}"
        seen.add(fields["id"])
        found.append({"id": "", "status": "completed", **more, **fields})
    return found


def _add(answer: Fields, item: InputMessage | CallItem | ReasoningItem) -> None:
    match item:
        case InputMessage():
            answer["content"] = f"{answer['content']}{_text(item.content)}"
        case ReasoningItem():
            if text := "\n".join(part.text for part in item.content or item.summary or ()):
                answer["reasoning_content"] = text
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            calls = answer.setdefault("tool_calls", [])
            assert isinstance(calls, list)
            calls.append({"id": item.call_id, "type": "function", "function": function})


def _text(content: str | list[ContentText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _tool(tool: ResponseTool) -> Fields:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: v for name in names if (v := getattr(tool, name)) is not None}}


def _choice(body: ResponsesRequest) -> object:
    match body.tool_choice:
        case NamedFunction(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedFunctions() as some:
            tools = [{"type": "function", "function": {"name": each.name}} for each in some.tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": some.mode, "tools": tools}}
        case other:
            return other
