"""Routes that score texts against a query: /rerank with the paths of Jina and Cohere, and vLLM's /score."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.documentation import BODY, documented
from sgl_jax.server.embeddings_api import about_answer
from sgl_jax.server.encoding_answers import (
    LabelScores,
    RankedDocument,
    RankedList,
    RankedResult,
    ScoreList,
    ScoreObject,
)
from sgl_jax.server.encoding_bodies import RerankRequest, ScoreRequest
from sgl_jax.server.encoding_inputs import launch_that
from sgl_jax.server.relevance_scores import Pairs, Side, scores_of
from sgl_jax.server.sse import json_unless_disconnected
from sgl_jax.server.token_scores import token_scores

_FIRST, _SECOND = ("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Embeddings"])
    ranking = documented(RankedList, 404, 409, 429, *BODY, streams=False)
    scoring = documented(ScoreList, 404, 409, 429, *BODY, other=LabelScores, streams=False)

    @routes.post("/rerank", **ranking)
    @routes.post("/v1/rerank", **ranking)
    @routes.post("/v2/rerank", **ranking)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Scores documents against a query, and returns the best first."""
        return await json_unless_disconnected(request, ranked(state, body, request))

    @routes.post("/score", **scoring)
    @routes.post("/v1/score", **scoring)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Scores pairs of texts, in their order, or tells the probabilities of label_token_ids after query and item."""
        if body.label_token_ids is not None:
            return await json_unless_disconnected(request, token_scores(state, body, body.label_token_ids, request))
        return await json_unless_disconnected(request, scored(state, body, request))

    return routes


def _launch(state: ServerState, path: str) -> PoolingInfo:
    return launch_that(state, path, ["score", "classify", "embed"])


async def ranked(state: ServerState, body: RerankRequest, request: Request) -> RankedList:
    pooling = _launch(state, "/rerank")
    if body.instruction is not None and body.instruct is not None:
        raise InvalidParameter("instruct", "give either instruction or instruct")
    texts = [each if isinstance(each, str) else each.text for each in body.documents]
    sides = Side([body.query], "query", False), Side(texts, "documents", True)
    instruction = (body.instruction, "instruction") if body.instruct is None else (body.instruct, "instruct")
    of_all = state.adapter_of(body.model), body.cache_salt or "", body.priority or 0
    scores, found = await scores_of(state, pooling, Pairs(*sides, *instruction, body.use_activation, *of_all))
    best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]
    results = [RankedResult(i, scores[i]) for i in best]
    if body.return_documents is not False:
        for each in results:
            each.document = RankedDocument(texts[each.index])
    about = about_answer("rerank", state, body, found, request)
    return RankedList(about["id"], about["model"], about["usage"], results)


async def scored(state: ServerState, body: ScoreRequest, request: Request) -> ScoreList:
    for name in ("query", "apply_softmax", "item_first"):
        if getattr(body, name) is not None:
            raise InvalidParameter(name, f"{name} needs label_token_ids")
    pooling = _launch(state, "/score")
    first, second = _side(body, _FIRST), _side(body, _SECOND)
    if len(first.texts) not in (1, len(second.texts)):
        counts = f"{first.field} has {len(first.texts)} texts and {second.field} {len(second.texts)}"
        raise InvalidParameter(first.field, f"{counts}; give one for all, or as many")
    of_all = state.adapter_of(body.model), body.cache_salt or "", body.priority or 0
    pairs = Pairs(first, second, body.instruction, "instruction", body.use_activation, *of_all)
    scores, found = await scores_of(state, pooling, pairs)
    data = [ScoreObject(i, score) for i, score in enumerate(scores)]
    return ScoreList(data, **about_answer("score", state, body, found, request))


def _side(body: ScoreRequest, names: Sequence[str]) -> Side:
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        wrong = f"{' and '.join(given)} were given" if given else f"{names[0]} is missing"
        raise InvalidParameter((given or names)[0], f"{wrong}; give one of {', '.join(names)}")
    value: str | list[str] | list[list[int]] = getattr(body, given[0])
    texts = [value] if isinstance(value, str) else [each for each in value if isinstance(each, str)]
    if not texts:
        raise InvalidParameter(given[0], f"{given[0]} is token ids, which need label_token_ids; give texts")
    return Side(texts, given[0], not isinstance(value, str))
