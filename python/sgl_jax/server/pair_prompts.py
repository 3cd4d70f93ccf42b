"""Prompts in which a reranker reads a query and a document together."""

import re
from functools import cache, partial

from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState

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


async def pair_ids(
    state: ServerState, pooling: PoolingInfo, instruction: str | None, query: str, document: str, name: str
) -> list[int]:
    """Return the prompt of a pair, whose document came in the field `name`: by the chat template if that has the roles query
    and document, by the template of Qwen3's rerankers, or, for a classifier, as the tokenizer joins two texts. Raises
    InvalidParameter if none fits."""
    template = state.tokenizer.template_source()
    if template is not None and _has_roles(template):
        system = [] if instruction is None else [("system", instruction)]
        text = await state.render_roles([*system, ("query", query), ("document", document)])
        return await state.encode(text, name, False)
    if state.service.info.architecture.startswith("Qwen3"):
        text = _QWEN3.format(instruction=instruction or _INSTRUCTION, query=query, document=document)
        return await state.encode(text, name, False)
    if instruction is not None:
        raise InvalidParameter("instruction", "instruction cannot be had: the model's template has no place for one")
    if pooling.kind == "score":
        raise InvalidParameter("model", _NO_TEMPLATE)
    await state.encode(query, "query")  # which refuses what is too long, or no Unicode
    await state.encode(document, name)
    return await state.text_work(len(query) + len(document), partial(state.tokenizer.encode_pair, query, document))


@cache
def _has_roles(template: str) -> bool:
    return all(re.search(f"['\"]{role}['\"]", template) for role in ("query", "document"))
