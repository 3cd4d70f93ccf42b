"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.generation import Generation, GenerationRequest, Given, Update
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.engine.native_params import finite
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, gone, json_response
from sgl_jax.server.bodies import openai_params
from sgl_jax.server.documentation import documented
from sgl_jax.server.openai_stream import ChunkWriter
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    TopLogprob,
)
from sgl_jax.server.sse import DONE, EventStream, unless_disconnected
from sgl_jax.server.usage import UsageCounter
from sgl_jax.text.tokenizer import Tokenizer


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", **documented(ChatCompletion, stream=True, model=True))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        state.check_model(body.model)
        body.check_stream_options()
        given = _given(body)
        prompt_ids = await state.encode_chat(body.messages, body)
        asked = GenerationRequest.of(prompt_ids, "messages", given, body.rid or "", body.cache_salt or "")
        generation = state.service.submit([asked], stream=bool(body.stream))
        chat = _Chat(state, body, generation)
        if body.stream:
            return EventStream(generation, chat.events())
        found = await unless_disconnected(request, chat.completion())
        return gone() if found is None else json_response(found)

    return routes


def _given(body: ChatCompletionRequest) -> Given:
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidParameter("max_tokens", "max_tokens and max_completion_tokens differ; give one")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs", "top_logprobs needs logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    names = {} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
    return openai_params(body, {"max_tokens": next(iter(limits), None), "logprobs": logprobs}, names)


class _Chat:
    """One chat completion on its way out."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest, generation: Generation):
        self._tokenizer = state.tokenizer
        self._model = body.model or state.model_name
        self._generation = generation
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(generation.created)
        self._logprobs = bool(body.logprobs)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage = UsageCounter(generation.requests)

    async def completion(self) -> ChatCompletion:
        n = self._generation.requests[0].params.n
        texts, scores = [""] * n, [ChatLogprobs([]) for _ in range(n)]
        finish: list[Any] = [None] * n
        async for updates in self._generation.updates():
            for update in updates:
                self._usage.add(update)
                texts[update.choice] += update.text
                scores[update.choice].content += self._scored(update)
                finish[update.choice] = update.finish and update.finish.type
        choices = [
            ChatChoice(i, AssistantMessage("assistant", texts[i]), scores[i] if self._logprobs else None, finish[i])
            for i in range(n)
        ]
        return ChatCompletion(self._id, "chat.completion", self._created, self._model, choices, self._usage.total())

    async def events(self) -> AsyncIterator[bytes]:
        write = ChunkWriter(self._id, "chat.completion.chunk", self._created, self._model, self._include_usage)
        greeted: set[int] = set()
        async for updates in self._generation.updates():
            data = b""
            for update in updates:
                self._usage.add(update)
                i = update.choice
                if i not in greeted:
                    greeted.add(i)
                    data += write.role(i)
                logprobs = ChatLogprobs(self._scored(update)) if self._logprobs and update.token_ids else None
                if update.text or logprobs is not None:
                    data += write.delta(i, update.text, logprobs)
                if update.finish is not None:
                    data += write.delta_end(i, update.finish.type)
            if data:
                yield data
        if self._include_usage:
            yield write.usage(self._usage.total())
        yield DONE

    def _scored(self, update: Update) -> list[ChatTokenLogprob]:
        return chat_logprobs(self._tokenizer, update.token_ids, update.logprobs) if self._logprobs else []


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenLogprobs]
) -> list[ChatTokenLogprob]:
    def spelled(token: int, logprob: float) -> tuple[str, float, list[int]]:
        return tokenizer.token_text(token), finite(logprob), list(tokenizer.token_bytes(token))

    return [
        ChatTokenLogprob(
            *spelled(token, score.logprob),
            [
                TopLogprob(*spelled(other, logprob))
                for other, logprob in zip(score.top_ids, score.top_logprobs, strict=True)
            ],
        )
        for token, score in zip(tokens, scores, strict=True)
    ]
