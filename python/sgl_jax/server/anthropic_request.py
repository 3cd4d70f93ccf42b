"""Requests of Anthropic's Messages API as chat completion requests."""

import json
from collections.abc import Iterator

from pydantic import ValidationError

from sgl_jax.request import InvalidParameter
from sgl_jax.server.anthropic_types import (
    Block,
    CountTokensRequest,
    MessagesRequest,
    MessagesTool,
    MessageTurn,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from sgl_jax.server.chat_turns import Fields, merged
from sgl_jax.server.grammar_fields import JsonObject
from sgl_jax.server.openai_types import ChatCompletionRequest

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(body: CountTokensRequest, thinks: bool) -> ChatCompletionRequest:
    """Return the chat that a request asks for. `thinks`: the model's answers have thoughts. Raises InvalidParameter."""
    messages = merged([*_system(body), *_turns(body.messages)])
    fields: Fields = {"model": body.model, "messages": messages}
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        fields["continue_final_message"] = True  # the answer goes on with it
    if body.tools:
        fields |= {"tools": [_tool(each) for each in body.tools], **_tool_choice(body)}
    elif body.tool_choice is not None and body.tool_choice.type != "none":
        raise InvalidParameter("tool_choice", "tool_choice needs tools")
    fields |= _thinking(body, thinks) | _output(body, thinks)
    if isinstance(body, MessagesRequest):
        fields |= {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences}
        fields |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "priority")}
    try:
        return ChatCompletionRequest.model_validate({name: v for name, v in fields.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidParameter("messages", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _system(body: CountTokensRequest) -> Iterator[Fields]:
    if body.system:
        yield {"role": "system", "content": _joined(body.system)}


def _turns(turns: list[MessageTurn]) -> Iterator[Fields]:
    """Yield the messages of a chat: results of tools are messages of their own, before the text of their turn."""
    for i, turn in enumerate(turns):
        blocks: list[Block] = (
            turn.content if isinstance(turn.content, list) else [TextBlock(type="text", text=turn.content)]
        )
        if turn.role == "assistant":
            yield _answer(blocks, f"messages[{i}]")
            continue
        for j, block in enumerate(blocks):
            if not isinstance(block, TextBlock | ToolResultBlock):
                raise InvalidParameter(
                    "messages", f"messages[{i}].content[{j}] is {block.type} in a turn of {turn.role}"
                )
            if isinstance(block, ToolResultBlock):
                text = ("Error: " if block.is_error else "") + _joined(block.content or "")
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        if texts or not blocks:
            yield {"role": "user", "content": _joined(texts)}  # templates take no system in the midst


def _answer(blocks: list[Block], where: str) -> Fields:
    found: Fields = {"role": "assistant", "content": _joined([each for each in blocks if isinstance(each, TextBlock)])}
    if thoughts := [each.thinking for each in blocks if isinstance(each, ThinkingBlock)]:
        found["reasoning_content"] = "\n".join(thoughts)
    if calls := [each for each in blocks if isinstance(each, ToolUseBlock)]:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.input}}
            for call in calls
        ]
    if any(isinstance(each, ToolResultBlock) for each in blocks):
        raise InvalidParameter("messages", f"{where} has a tool_result, which belongs into a turn of user")
    return found


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool(tool: MessagesTool) -> Fields:
    function: Fields = {"name": tool.name, "parameters": tool.input_schema}
    function |= {name: value for name in ("description", "strict") if (value := getattr(tool, name)) is not None}
    return {"type": "function", "function": function}


def _tool_choice(body: CountTokensRequest) -> Fields:
    if (choice := body.tool_choice) is None:
        return {}
    found: Fields = {"parallel_tool_calls": False if choice.disable_parallel_tool_use else None}
    if choice.type != "tool":
        return found | {"tool_choice": _CHOICES[choice.type]}
    if choice.name is None:
        raise InvalidParameter("tool_choice", "tool_choice of type tool needs name")
    return found | {"tool_choice": {"type": "function", "function": {"name": choice.name}}}


def _thinking(body: CountTokensRequest, thinks: bool) -> Fields:
    """Return the fields of thoughts. A model that does not think keeps to any budget, and clients ask all models for them."""
    if (thinking := body.thinking) is None:
        thinking = Thinking(type="disabled")
    budget = thinking.budget_tokens
    if thinking.type == "enabled" and budget is None:
        raise InvalidParameter("thinking.budget_tokens", "thinking.budget_tokens is missing")
    if thinking.type != "enabled" and budget is not None:
        raise InvalidParameter("thinking.budget_tokens", f"thinking of type {thinking.type} takes no budget_tokens")
    if budget is not None and isinstance(body, MessagesRequest) and budget >= body.max_tokens:
        text = f"thinking.budget_tokens is {budget}; it must be below max_tokens, which is {body.max_tokens}"
        raise InvalidParameter("thinking.budget_tokens", text)
    if not thinks:
        return {}
    switched = thinking.type != "disabled"
    found: Fields = {"chat_template_kwargs": {"enable_thinking": switched, "thinking": switched}}
    hidden = thinking.display == "omitted"
    return found | ({"thinking_token_budget": budget} if budget is not None else {}) | {"include_reasoning": not hidden}


def _output(body: CountTokensRequest, thinks: bool) -> Fields:
    config, form = body.output_config, body.output_format
    if config is not None and config.format is not None:
        if form is not None:
            raise InvalidParameter("output_format", "output_format and output_config.format are the same; give one")
        form = config.format
    found: Fields = {}
    if config is not None and config.effort is not None and thinks:
        found["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
    if form is not None:
        found["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.schema_}}
    return found


def arguments_of(text: str) -> JsonObject:
    """Return the input of a call with these arguments, without lone surrogates. What is no JSON object, since the answer was
    cut, counts as none."""
    try:
        valid = json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
    except (ValueError, RecursionError):
        return {}
    found = json.loads(valid)
    return found if isinstance(found, dict) else {}
