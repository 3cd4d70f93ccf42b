"""Routes that answer with a prompt's vector: OpenAI's /v1/embeddings, vLLM's /classify, and the native /encode."""

import base64
import time
import uuid
from collections.abc import Sequence
from typing import TypedDict, cast

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.encoding import Encoded
from sgl_jax.engine.native_call import Reply
from sgl_jax.engine.native_encoding import native_encoding
from sgl_jax.engine.pooled_results import check_dimensions, check_scores, embedding, probabilities
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.documentation import BODY, documented
from sgl_jax.server.encoding_answers import (
    EmbeddingList,
    EmbeddingObject,
    EncodeAnswer,
    LabelList,
    LabelObject,
    PooledList,
    PooledObject,
    VectorUsage,
)
from sgl_jax.server.encoding_bodies import ClassifyRequest, EmbeddingRequest, EncodeBody, PoolingRequest, VectorFields
from sgl_jax.server.encoding_inputs import inputs_of, launch_that
from sgl_jax.server.native_api import num_units
from sgl_jax.server.relevance_scores import score_of
from sgl_jax.server.sse import json_unless_disconnected


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Embeddings"])

    @routes.post("/v1/embeddings", **documented(EmbeddingList, 404, 409, 429, *BODY, streams=False))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await json_unless_disconnected(request, _embeddings(state, body, request))

    @routes.post("/classify", **documented(LabelList, 404, 409, 429, *BODY, streams=False))
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        return await json_unless_disconnected(request, _labels(state, body, request))

    @routes.post("/pooling", **documented(PooledList, 404, 409, 429, *BODY, streams=False))
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        """Answers with the vector that the launch makes: an embedding, probabilities of labels, or a score."""
        return await json_unless_disconnected(request, _pooled(state, body, request))

    @routes.post("/encode", **documented(EncodeAnswer, 404, 409, 429, *BODY, or_list=True, streams=False))
    async def encode(body: EncodeBody, request: Request) -> Response:
        return await json_unless_disconnected(request, _native(state, body, request))

    return routes


class About(TypedDict):
    """Fields that all answers in lists have."""

    id: str
    created: int
    model: str
    usage: VectorUsage


def about_answer(
    kind: str, state: ServerState, body: VectorFields, found: Sequence[Encoded], request: Request
) -> About:
    """Count the tokens of an answer, also for the request's log line, and give it an id that begins with `kind`."""
    num_tokens = sum(each.num_prompt_tokens for each in found)
    adapter = state.adapter_of(body.model)
    request.state.tokens, request.state.adapters = (num_tokens, 0), [adapter] if adapter else []
    usage, model = VectorUsage(num_tokens, num_tokens), body.model or state.model_name
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model, "usage": usage}


async def _embeddings(state: ServerState, body: EmbeddingRequest, request: Request) -> msgspec.Raw:
    pooling = launch_that(state, "/v1/embeddings", ["embed"])
    check_dimensions(pooling, body.dimensions)
    asked = {each for each in (body.normalize, body.use_activation) if each is not None}
    if len(asked) > 1:
        raise InvalidParameter("normalize", "normalize and use_activation differ; give one")
    pooling = msgspec.structs.replace(pooling, normalize=next(iter(asked), pooling.normalize))
    found = await state.service.encode(await inputs_of(state, body, _text_before(pooling, body)))
    about = about_answer("embd", state, body, found, request)

    def answer() -> msgspec.Raw:
        vectors = (embedding(each.vector, pooling, body.dimensions) for each in found)
        as_text = body.encoding_format == "base64"
        data = [EmbeddingObject(i, _as_base64(each) if as_text else each.tolist()) for i, each in enumerate(vectors)]
        return msgspec.Raw(msgspec.json.encode(EmbeddingList(data, **about)))

    return await state.text_work(len(found) * pooling.size, answer)


def _text_before(pooling: PoolingInfo, body: EmbeddingRequest) -> str:
    """Return the text that the checkpoint puts before inputs under the body's prompt_name; without one none."""
    if (name := body.prompt_name) is None:
        return ""
    given = body.input[:1] if isinstance(body.input, list) else [body.input]
    if not all(isinstance(each, str) for each in given):
        raise InvalidParameter(
            "prompt_name", "prompt_name needs input that is text: nothing is put before ids or messages"
        )
    if name not in pooling.prompts:
        known = f"it has {', '.join(pooling.prompts)}" if pooling.prompts else "it has none"
        raise InvalidParameter(
            "prompt_name", f"prompt_name is {name[:100]}, which the checkpoint does not know; {known}"
        )
    return pooling.prompts[name]


def _as_base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _as_wanted(pooling: PoolingInfo, use_activation: bool | None) -> PoolingInfo:
    """Return how vectors are made with the request's use_activation. Raises InvalidParameter where there is no activation."""
    if use_activation is None:
        return pooling
    if pooling.kind == "embed":
        return msgspec.structs.replace(pooling, normalize=use_activation)
    if use_activation and pooling.activation == "none":
        text = "use_activation is true, but the model is a regression, whose logits are its answer; leave it out"
        raise InvalidParameter("use_activation", text)
    return pooling if use_activation else msgspec.structs.replace(pooling, activation="none")


async def _labels(state: ServerState, body: ClassifyRequest, request: Request) -> msgspec.Raw:
    pooling = launch_that(state, "/classify", ["classify"])
    pooling = _as_wanted(pooling, body.use_activation)
    found = await state.service.encode(await inputs_of(state, body))
    about = about_answer("classify", state, body, found, request)

    def answer() -> msgspec.Raw:
        data = []
        for i, each in enumerate(found):
            label = pooling.labels[int(each.vector.argmax())]
            data.append(LabelObject(i, label, probabilities(each.vector, pooling).tolist(), pooling.size))
        return msgspec.Raw(msgspec.json.encode(LabelList(data, **about)))

    return await state.text_work(len(found) * pooling.size, answer)


async def _pooled(state: ServerState, body: PoolingRequest, request: Request) -> msgspec.Raw:
    pooling = launch_that(state, "/pooling", ["embed", "classify", "score"])
    if body.task not in (None, pooling.kind):
        text = f"task is {body.task}; this launch has --task {pooling.kind}, and makes one vector of each input"
        raise InvalidParameter("task", text)
    if body.dimensions is not None and pooling.kind != "embed":
        raise InvalidParameter("dimensions", f"dimensions cannot be had with --task {pooling.kind}; leave it out")
    check_dimensions(pooling, body.dimensions)
    if pooling.kind == "score":
        check_scores(pooling)
    made = _as_wanted(pooling, body.use_activation)
    found = await state.service.encode(await inputs_of(state, body))
    about = about_answer("pool", state, body, found, request)

    def answer() -> msgspec.Raw:
        data = [PooledObject(i, _pooled_data(each.vector, made, body)) for i, each in enumerate(found)]
        return msgspec.Raw(msgspec.json.encode(PooledList(data, **about)))

    return await state.text_work(len(found) * pooling.size, answer)


def _pooled_data(logits: np.ndarray, pooling: PoolingInfo, body: PoolingRequest) -> list[float] | str:
    if pooling.kind == "embed":
        vector = embedding(logits, pooling, body.dimensions)
    elif pooling.kind == "score":
        vector = np.array([score_of(logits, pooling, body.use_activation is not False)], np.float32)
    else:
        vector = probabilities(logits, pooling)
    return _as_base64(vector) if body.encoding_format == "base64" else vector.tolist()


async def _native(state: ServerState, body: EncodeBody, request: Request) -> object:
    state.service.check_ready()
    rid = body.rid or uuid.uuid4().hex
    given = body.text, body.input_ids, body.dimensions, rid, body.lora_path, body.priority or 0
    size = num_units(body.text) + num_units(body.input_ids)
    call = await state.text_work(size, lambda: native_encoding(state.service, *given))
    found = await call.result(state.service)
    numbers = [each["meta_info"] for each in ([found] if isinstance(found, dict) else found)]
    num_tokens = sum(cast(dict[str, int], each)["prompt_tokens"] for each in numbers)
    adapters = body.lora_path if isinstance(body.lora_path, list) else [body.lora_path]
    request.state.tokens, request.state.adapters = (num_tokens, 0), {each for each in adapters if each}
    if isinstance(found, dict):
        return _with_id(found, rid if isinstance(rid, str) else rid[0])
    several = len(found) > 1
    ids = rid if not isinstance(rid, str) else [f"{rid}_{i}" if several else rid for i in range(len(found))]
    return [_with_id(each, name) for each, name in zip(found, ids, strict=True)]


def _with_id(reply: Reply, name: str) -> Reply:
    numbers = reply["meta_info"]
    assert isinstance(numbers, dict)
    return {**reply, "meta_info": {"id": name, **numbers}}
