"""Native API: POST /generate, the SGLang family's own format; /tokenize, /detokenize, /abort_request, /flush_cache."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from sgl_jax.engine.generation import Generation, GenerationRequest
from sgl_jax.engine.native_call import NativeCall, native_call
from sgl_jax.engine.native_params import LogprobOptions
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.bodies import (
    Body,
    CacheKey,
    TokenId,
    limits,
    native_params,
    null_fields,
    off_fields,
    sampling_fields,
    with_fields,
)
from sgl_jax.server.documentation import BODY, STREAM, documented
from sgl_jax.server.openai_types import DetokenizeRequest, TokenizeRequest
from sgl_jax.server.responses import Aborted, CacheFlush, DetokenizeResponse, GenerateAnswer, TokenizeResponse
from sgl_jax.server.sse import DONE, EventStream, event, json_unless_disconnected

Name = Annotated[str, Field(min_length=1)]
_MOST_TO_COUNT = 1_000_000  # tokens that /tokenize takes, if the context is not longer

_SGLANG_SAMPLING = "custom_params spaces_between_special_tokens stop_regex"
_SGLANG_GENERATE = (
    "custom_logit_processor data_parallel_rank lora_id return_hidden_states session_params token_ids_logprob"
)


@with_fields(sampling_fields("native"), off_fields("NativeSamplingParams"), null_fields(_SGLANG_SAMPLING))
class NativeSamplingParams(Body):
    pass


@with_fields(off_fields("GenerateRequest"), null_fields(_SGLANG_GENERATE))
class GenerateRequest(Body):
    """Either `text` or `input_ids`, one or a list; parameters and rid one for all or a list."""

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    sampling_params: NativeSamplingParams | list[NativeSamplingParams] | None = None
    rid: Name | list[Name] | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, limits("logprobs")] | None = None
    logprob_start_len: Annotated[int, Field(ge=-1)] | None = None
    return_text_in_logprobs: bool | None = None
    lora_path: Name | list[Name | None] | None = Field(None, description="names of adapters; null is the model itself")
    priority: Annotated[int, limits("priority")] | None = Field(None, description="that of sampling_params without one")
    extra_key: CacheKey | None = Field(None, description="requests share cached prefixes only within one key")


class AbortRequest(Body):
    rid: str | None = None
    abort_all: bool | None = None


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Native"])

    @routes.post("/generate", **documented(GenerateAnswer, *STREAM, or_list=True))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        texts = [body.text] if isinstance(body.text, str) else body.text or ()
        state.service.check_count(len(texts), 1, {"prompt": "text"})
        call = await state.text_work(num_units(body.text) + num_units(body.input_ids), lambda: _call(state, body))
        generation = await state.service.submit(call.requests, stream=bool(body.stream))
        request.state.generation = generation
        if body.stream:
            return EventStream(generation, _events(call, generation))
        return await json_unless_disconnected(request, call.answer(generation))

    async def spelled(ids: list[int]) -> list[str]:
        return await state.text_work(len(ids), lambda: [state.tokenizer.token_text(each) for each in ids])

    @routes.post("/tokenize", **documented(TokenizeResponse, 404, *BODY))
    async def tokenize(body: TokenizeRequest) -> Response:
        state.adapter_of(body.model)
        limit = state.service.info.context_length
        if (body.prompt is None) == (body.messages is None):
            raise InvalidParameter("prompt", "give either prompt or messages")
        special = body.add_special_tokens is not False
        if isinstance(body.prompt, list):
            rows = [await state.encode(prompt, "prompt", special, _MOST_TO_COUNT) for prompt in body.prompt]
            texts = [await spelled(row) for row in rows] if body.return_token_strs else msgspec.UNSET
            return json_response(TokenizeResponse([*rows], [len(row) for row in rows], limit, texts))
        if body.prompt is not None:
            ids = await state.encode(body.prompt, "prompt", special, _MOST_TO_COUNT)
        else:
            ids = await state.encode_chat(body.messages or (), body, _MOST_TO_COUNT)
        texts = await spelled(ids) if body.return_token_strs else msgspec.UNSET
        return json_response(TokenizeResponse([*ids], len(ids), limit, texts))

    @routes.post("/detokenize", **documented(DetokenizeResponse, 404, *BODY))
    async def detokenize(body: DetokenizeRequest) -> Response:
        state.adapter_of(body.model)
        limit = state.service.info.vocab_size
        is_batch = bool(body.tokens) and isinstance(body.tokens[0], list)
        rows: list[Any] = body.tokens if is_batch else [body.tokens]
        if any(max(row, default=0) >= limit for row in rows):
            raise InvalidParameter("tokens", f"tokens has an id above {limit - 1}, the end of the vocabulary")
        skip = body.skip_special_tokens is not False
        size = len(rows) + sum(map(len, rows))
        texts = await state.text_work(size, lambda: [state.tokenizer.decode(row, skip) for row in rows])
        return json_response(DetokenizeResponse(texts if is_batch else texts[0]))

    @routes.post("/abort_request", **documented(Aborted, *BODY))
    async def abort_request(body: AbortRequest) -> Response:
        if body.abort_all:
            return json_response(Aborted(state.service.abort_all()))
        if body.rid is None:
            raise InvalidParameter("rid", "give rid, or abort_all")
        return json_response(Aborted(state.service.abort(body.rid)))

    @routes.post("/flush_cache", **documented(CacheFlush))
    async def flush_cache() -> Response:
        return json_response(CacheFlush(True, await state.service.flush_cache()))

    return routes


def num_units(given: str | list[str] | list[int] | list[list[int]] | None) -> int:
    """Count characters or tokens of one prompt or several: the size of the work on them."""
    several = [each for each in given if not isinstance(each, int)] if isinstance(given, list) else []
    return len(given or ()) + sum(map(len, several))


def _call(state: ServerState, body: GenerateRequest) -> NativeCall:
    given = body.sampling_params or NativeSamplingParams()
    several = isinstance(given, list)
    each = [_read(one, body.priority) for one in (given if several else [given])]
    params = each if several else each[0]
    start, top = -1 if body.logprob_start_len is None else body.logprob_start_len, body.top_logprobs_num or 0
    options = LogprobOptions(bool(body.return_logprob), top, start, bool(body.return_text_in_logprobs))
    limit, key = state.service.info.context_length, body.extra_key or ""
    given = body.text, body.input_ids, params, body.rid, options, key, body.lora_path
    return native_call(state.tokenizer, limit, *given)


def _read(given: NativeSamplingParams, priority: int | None) -> GenerationRequest:
    """Read parameters, with a priority unless they have one."""
    request = native_params(given)
    if priority is None or "priority" in given.model_fields_set:
        return request
    return dataclasses.replace(request, params=msgspec.structs.replace(request.params, priority=priority))


async def _events(call: NativeCall, generation: Generation) -> AsyncIterator[bytes]:
    async for answer in call.stream(generation):
        yield event(answer)
    yield DONE
