"""Scores of pairs of texts: by a reranker, or by the cosine of their embeddings."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from sgl_jax.engine.encoding import Encoded, EncodeRequest
from sgl_jax.engine.pooled_results import check_scores, embedding, relevance
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.engine.slices import in_slices
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.pair_prompts import Pair, pair_ids


class Side(NamedTuple):
    """Texts of one side, and the field that has them."""

    texts: Sequence[str]
    field: str
    is_list: bool

    def name(self, index: int) -> str:
        return f"{self.field}[{index}]" if self.is_list else self.field


class Pairs(NamedTuple):
    """Pairs to be scored. One query is for all documents; several are for one each."""

    queries: Side
    documents: Side
    instruction: str | None
    instruction_name: str
    activation: bool | None  # false: scores are logits, and not probabilities
    adapter: str | None
    namespace: str
    priority: int

    def request(self, ids: list[int], name: str) -> EncodeRequest:
        return EncodeRequest(ids, "", name, self.namespace, self.adapter, self.priority)


async def scores_of(state: ServerState, pooling: PoolingInfo, pairs: Pairs) -> tuple[list[float], list[Encoded]]:
    """Return a score for each pair, and what was encoded for them. Raises InvalidParameter."""
    for side in (pairs.queries, pairs.documents):
        for i, text in enumerate(side.texts):
            if not text:
                raise InvalidParameter(side.name(i), f"{side.name(i)} is empty; at least one character is needed")
    _check_count(state, pooling, pairs)
    if pooling.kind == "embed":
        return await _cosines(state, pooling, pairs)
    check_scores(pooling)
    found = []
    async for i, document in in_slices(enumerate(pairs.documents.texts)):
        at, name = i if len(pairs.queries.texts) > 1 else 0, pairs.documents.name(i)
        texts = pairs.queries.texts[at], document, pairs.queries.name(at), name
        ids = await pair_ids(state, pooling, Pair(*texts, pairs.instruction, pairs.instruction_name))
        found.append(pairs.request(ids, name))
    encoded = await state.service.encode(found)
    return [score_of(each.vector, pooling, pairs.activation is not False) for each in encoded], encoded


def _check_count(state: ServerState, pooling: PoolingInfo, pairs: Pairs) -> None:
    """Raise QueueFull or InvalidParameter for more texts than the queue takes; embeddings are of queries, too."""
    documents, queries = pairs.documents, pairs.queries
    if pooling.kind != "embed":
        return state.service.check_count(len(documents.texts), 1, {"prompt": documents.field})
    try:
        state.service.check_count(len(documents.texts) + len(queries.texts), 1, {"prompt": documents.field})
    except InvalidParameter as error:
        raise InvalidParameter(error.param, f"{queries.field} and {error}") from None


def score_of(logits: np.ndarray, pooling: PoolingInfo, activation: bool) -> float:
    """Return the probability that the document is relevant, or its logit: that of "yes" against "no"."""
    if activation:
        return relevance(logits, pooling)
    return float(logits[-1] - logits[0]) if pooling.kind == "score" else float(logits[0])


async def _cosines(state: ServerState, pooling: PoolingInfo, pairs: Pairs) -> tuple[list[float], list[Encoded]]:
    if pairs.instruction is not None:
        name = pairs.instruction_name
        raise InvalidParameter(name, f"{name} cannot be had with --task embed; put it before the query")
    if pairs.activation is not None:
        reason = "use_activation cannot be had with --task embed, whose scores are cosines"
        raise InvalidParameter("use_activation", reason)
    requests = []
    for side in (pairs.queries, pairs.documents):
        async for i, text in in_slices(enumerate(side.texts)):
            ids = await state.encode(text, side.name(i))
            requests.append(pairs.request(ids, side.name(i)))
    found = await state.service.encode(requests)
    unit = msgspec.structs.replace(pooling, normalize=True)
    vectors = np.stack([embedding(each.vector, unit) for each in found])
    num_queries = len(pairs.queries.texts)
    cosines = (vectors[:num_queries] * vectors[num_queries:]).sum(axis=1)
    return [float(each) for each in cosines], found
