"""How the served model's answers are read, by the server's flags, its chat template and the request."""

from collections.abc import Mapping, Sequence

from sgl_jax.server.openai_types import ChatCompletionRequest, FunctionTool
from sgl_jax.settings.answer_parsers import CALL_PARSERS, THOUGHT_PARSERS
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.text.tool_calls.formats import HARMONY, calls_in, markers, thoughts_in
from sgl_jax.text.tool_calls.scanner import AnswerFormat, thought_state


def answer_format(
    args: ServerArgs, template: str, body: ChatCompletionRequest, tools: Sequence[FunctionTool], prompt: str
) -> AnswerFormat | None:
    """Return the format of the answer to a prompt. None: it is plain text."""
    calls = _chosen(args.tool_call_parser, CALL_PARSERS, calls_in(template)) if tools else None
    found = thoughts_in(template)
    thoughts = _chosen(args.reasoning_parser, THOUGHT_PARSERS, found)
    shown = body.separate_reasoning is False or thoughts is None
    if calls is not None and thoughts is None and found != HARMONY:  # calls are behind the thought
        thoughts = found
    if calls is None and thoughts is None:
        return None
    return AnswerFormat(
        calls,
        thoughts,
        thought_state(prompt, thoughts),
        {tool.function.name: tool.function.parameters or {} for tool in tools},
        show_thoughts=shown,
        one_call=body.parallel_tool_calls is False,
    )


def shown_tokens(form: AnswerFormat | None, tokenizer: Tokenizer) -> dict[int, str]:
    """Return the special tokens, by id, that the reader of the answer must see. Those that end an answer are none."""
    if form is None:
        return {}
    marks = "\n".join(markers(form.calls, form.thoughts))
    return {i: text for i, text in tokenizer.special.items() if text in marks and i not in tokenizer.end_ids}


def _chosen(parser: str, names: Mapping[str, str], found: str | None) -> str | None:
    return found if parser == "auto" else names.get(parser)
