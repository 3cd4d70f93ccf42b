"""How the served model's answers are read, by the server's flags, its chat template and the request."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sgl_jax.server.openai_types import ChatCompletionRequest, FunctionTool
from sgl_jax.settings.answer_parsers import CALL_PARSERS, THOUGHT_PARSERS
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, around_calls, calls_in, markers, thoughts_in
from sgl_jax.text.tool_calls.scanner import AnswerFormat, thought_state


class ChatFormats(NamedTuple):
    """Names of the formats in which a model answers chats."""

    calls: str | None  # None: no calls are looked for
    thoughts: str | None  # None: it does not think
    splits: bool  # thoughts are split off the content
    marked: bool  # a grammar can tell a call from other text as it begins


def chat_formats(args: ServerArgs, template: str, tokenizer: Tokenizer) -> ChatFormats:
    found = thoughts_in(template)
    calls = _chosen(args.tool_call_parser, CALL_PARSERS, calls_in(template))
    thoughts = _chosen(args.reasoning_parser, THOUGHT_PARSERS, found)
    return ChatFormats(calls, thoughts or found, thoughts is not None, calls is not None and _marked(calls, tokenizer))


def answer_format(
    formats: ChatFormats, body: ChatCompletionRequest, tools: Sequence[FunctionTool], prompt: str
) -> AnswerFormat | None:
    """Return the format of the answer to a prompt. None: it is plain text."""
    calls, thoughts = formats.calls if tools else None, formats.thoughts
    if not formats.splits and (calls is None or thoughts == HARMONY):  # else calls are behind the thought
        thoughts = None
    if calls is None and thoughts is None:
        return None
    return AnswerFormat(
        calls,
        thoughts,
        thought_state(prompt, thoughts, bool(body.continue_final_message)),
        {tool.function.name: tool.function.parameters or {} for tool in tools},
        show_thoughts=body.separate_reasoning is False or not formats.splits,
        one_call=body.parallel_tool_calls is False,
    )


def shown_tokens(form: AnswerFormat | None, formats: ChatFormats, tokenizer: Tokenizer) -> dict[int, str]:
    """Return the special tokens, by id, that are in the answer's text: those that its reader must see, and the markers of
    thoughts that stay in the content. Those that end an answer are none."""
    calls, thoughts = (None, None) if form is None else (form.calls, form.thoughts)
    marks = "\n".join(markers(calls, thoughts if formats.splits else formats.thoughts))
    return {i: text for i, text in tokenizer.special.items() if text in marks and i not in tokenizer.end_ids}


def _chosen(parser: str, names: Mapping[str, str], found: str | None) -> str | None:
    return found if parser == "auto" else names.get(parser)


def _marked(calls: str, tokenizer: Tokenizer) -> bool:
    token = tokenizer.backend.token_to_id(around_calls(calls, None)[0])
    is_bare = calls != HARMONY and any(len(opener) == 1 for opener in CALLS[calls].openers)
    return is_bare or (token is not None and tokenizer.is_added(token))
