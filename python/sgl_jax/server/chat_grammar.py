"""The grammar of a chat's answer: a thought, calls and content, each as far as the request binds it."""

import dataclasses
from collections.abc import Mapping

import msgspec

from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.request import GRAMMAR_KINDS, InvalidParameter, Json
from sgl_jax.server.answer_formats import ChatFormats
from sgl_jax.server.openai_types import ChatCompletionRequest, Function
from sgl_jax.server.tool_choice import Callables
from sgl_jax.text.tool_calls.answer_form import AnswerForm, CallableFunction
from sgl_jax.text.tool_calls.scanner import thought_state

_ANY_OBJECT: dict[str, Json] = {"type": "object"}
_NO_ARGUMENTS: dict[str, Json] = {"type": "object", "properties": {}, "additionalProperties": False}


def bound(
    given: GenerationRequest, body: ChatCompletionRequest, tools: Callables, formats: ChatFormats, prompt: str
) -> GenerationRequest:
    """Return the request under a grammar of its whole answer, if that must be more than content. Raises InvalidParameter
    for what cannot be enforced."""
    strict = _strict(body, tools)
    _check(body, tools, formats, strict, is_free=given.params.grammar is None)
    content = None if tools.must_call else given.params.grammar
    state = thought_state(prompt, formats.thoughts, bool(body.continue_final_message))
    thoughts = None if state == "closed" else formats.thoughts
    budget = None if thoughts is None else body.thinking_token_budget
    possible = formats.calls if tools.allowed and (tools.must_call or content or formats.marked) else None
    calls = possible if tools.must_call or tools.restricted or strict or content is not None else None
    if calls is None and budget is None and (content is None or thoughts is None):
        return given
    form = AnswerForm(
        thoughts,
        state,
        budget,
        calls,
        tuple(CallableFunction(tool.function.name, _arguments(tool.function)) for tool in tools.allowed if calls),
        tools.must_call,
        body.parallel_tool_calls is False,
        content,
    )
    name = _name(given, body, tools, strict)
    try:
        text = form.grammar().text
    except RecursionError as error:
        raise InvalidParameter(name, f"{name} has schemas that are nested too deeply") from error
    params = msgspec.structs.replace(given.params, answer_form=text, **dict.fromkeys(GRAMMAR_KINDS))
    return dataclasses.replace(given, params=params, names={**given.names, "answer_form": name})


def _strict(body: ChatCompletionRequest, tools: Callables) -> dict[str, Function]:
    """Return, by their fields, the functions that an answer may call with nothing but the arguments that they declare."""
    allowed = {tool.function.name for tool in tools.allowed}
    found = {f"tools[{i}].function": tool.function for i, tool in enumerate(body.tools or ())}
    return {field: function for field, function in found.items() if function.strict and function.name in allowed}


def _check(
    body: ChatCompletionRequest, tools: Callables, formats: ChatFormats, strict: Mapping[str, Function], is_free: bool
) -> None:
    if body.thinking_token_budget is not None and formats.thoughts is None:
        text = (
            "thinking_token_budget: this model's chat template shows no thoughts; --reasoning-parser names their format"
        )
        raise InvalidParameter("thinking_token_budget", text)
    field = "tool_choice" if tools.must_call else f"{next(iter(strict))}.strict" if strict else ""
    if field and formats.calls is None:
        raise InvalidParameter(field, f"{field} needs calls, but --tool-call-parser none looks for none")
    if strict and is_free and not tools.must_call and not formats.marked:
        text = f"{field} is true, but calls in the format {formats.calls} begin like other text of this model; "
        raise InvalidParameter(field, text + "give tool_choice required, or strict false")
    for field, function in strict.items():
        if (kind := _arguments(function).get("type", "object")) != "object":
            said = f"{field}.parameters: its type is {kind}, but the arguments of a call are an object"
            raise InvalidParameter(f"{field}.parameters", said)


def _arguments(function: Function) -> dict[str, Json]:
    return (function.parameters or _NO_ARGUMENTS) if function.strict else _ANY_OBJECT


def _name(
    given: GenerationRequest, body: ChatCompletionRequest, tools: Callables, strict: Mapping[str, Function]
) -> str:
    """Return the field to which an error of the grammar belongs."""
    if strict:
        return f"{next(iter(strict))}.parameters" if len(strict) == 1 else "tools"
    if (content := given.params.grammar) is not None and not tools.must_call:
        return given.names.get(content.kind, content.kind)
    return "tool_choice" if tools.must_call or tools.restricted else "thinking_token_budget"
