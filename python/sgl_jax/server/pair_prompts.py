"""Prompts in which a reranker reads a query and a document together."""

import re
from functools import cache, partial
from typing import NamedTuple

from sgl_jax.engine.generation import PromptTooLong
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.text.tokenizer import TextTooLong

_NO_TEMPLATE = (
    "the model has no template for a query and a document, without which scores mean nothing; give one whose messages "
    "have the roles query and document with --chat-template"
)

# The template of Qwen3's rerankers, which their checkpoints do not all contain.
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Pair(NamedTuple):
    """Query and document, with the names of the fields that they came in."""

    query: str
    document: str
    query_name: str
    name: str  # the document's
    instruction: str | None = None
    instruction_name: str = "instruction"


async def pair_ids(state: ServerState, pooling: PoolingInfo, pair: Pair) -> list[int]:
    """Return the prompt of a pair: by the chat template if that has the roles query and document, by the template of
    Qwen3's rerankers, or, for a classifier, as the tokenizer joins two texts. Raises InvalidParameter if none fits."""
    instruction, tokenizer = pair.instruction, state.tokenizer
    _check_unicode(pair)
    template = tokenizer.template_source()
    if template is not None and _has_roles(template):
        system = [] if instruction is None else [("system", instruction)]
        text = await state.render_roles([*system, ("query", pair.query), ("document", pair.document)])
    elif state.service.info.architecture.startswith("Qwen3"):
        text = _QWEN3.format(instruction=instruction or _INSTRUCTION, query=pair.query, document=pair.document)
    elif instruction is not None:
        name = pair.instruction_name
        raise InvalidParameter(name, f"{name} cannot be had: the model's template has no place for one")
    elif pooling.kind == "score":
        raise InvalidParameter("model", _NO_TEMPLATE)
    else:
        for text in (pair.query, pair.document):
            await _encoded(state, pair, text)  # which refuses what is too long
        ids = await state.text_work(
            len(pair.query) + len(pair.document), partial(tokenizer.encode_pair, pair.query, pair.document)
        )
        return _fitting(state, pair, ids)
    return _fitting(state, pair, await _encoded(state, pair, text))


def _check_unicode(pair: Pair) -> None:
    texts = {pair.query_name: pair.query, pair.instruction_name: pair.instruction or "", pair.name: pair.document}
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter(name, f"{name} has a lone surrogate, which is not valid Unicode") from error


async def _encoded(state: ServerState, pair: Pair, text: str) -> list[int]:
    encode = partial(state.tokenizer.encode, text, False, state.service.info.context_length)
    try:
        return await state.text_work(len(text), encode)
    except TextTooLong as error:
        raise _too_long(pair, str(error)) from error


def _fitting(state: ServerState, pair: Pair, ids: list[int]) -> list[int]:
    limit = min(state.service.info.context_length, state.service.info.max_total_tokens)
    if len(ids) > limit:
        raise _too_long(pair, f"{len(ids)} tokens; this model's maximum context length is {limit} tokens")
    return ids


def _too_long(pair: Pair, number: str) -> PromptTooLong:
    return PromptTooLong(pair.name, f"the prompt is too long: {pair.query_name} and {pair.name} together have {number}")


@cache
def _has_roles(template: str) -> bool:
    return all(re.search(f"['\"]{role}['\"]", template) for role in ("query", "document"))
