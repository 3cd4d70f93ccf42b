"""POST /v1/completions: text or token-id prompts, one or many, with echo and OpenAI's older logprobs format."""

from __future__ import annotations

import dataclasses
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
from sgl_jax.server.openai_types import CompletionRequest
from sgl_jax.server.responses import Completion, CompletionChoice, CompletionLogprobs
from sgl_jax.server.sse import DONE, EventStream, unless_disconnected
from sgl_jax.server.usage import UsageCounter
from sgl_jax.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", **documented(Completion, stream=True, model=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        state.check_model(body.model)
        body.check_stream_options()
        given = _given(body)
        prompts, echoes = await _prompts(state, body)
        asked = [
            GenerationRequest.of(ids, "prompt", given, _rid(body, i, len(prompts)), body.cache_salt or "")
            for i, ids in enumerate(prompts)
        ]
        generation = state.service.submit(asked, stream=bool(body.stream))
        completion = _Completion(state, body, generation, echoes)
        if body.stream:
            return EventStream(generation, completion.events())
        found = await unless_disconnected(request, completion.completion())
        return gone() if found is None else json_response(found)

    return routes


def _given(body: CompletionRequest) -> Given:
    """Reads the parameters. `echo` with `max_tokens` 0 scores the prompt and generates nothing."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens", "max_tokens is 0; it must be at least 1 unless echo is set")
    own = {
        "max_tokens": max(max_tokens, 1),
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
    }
    given = openai_params(body, own, {})
    if body.best_of not in (None, given.params.n):
        raise InvalidParameter("best_of", f"best_of is {body.best_of}; only n, which is {given.params.n}, is supported")
    return dataclasses.replace(given, score_only=max_tokens == 0)


async def _prompts(state: ServerState, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Every prompt's token ids, and the text that `echo` repeats."""
    given = body.prompt
    if not given:
        raise InvalidParameter("prompt", "prompt is empty; at least one token is needed")
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    ids, echoes = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(await state.encode(prompt, "prompt"))
            echoes.append(prompt)
        else:
            ids.append(prompt)
            echoes.append(state.tokenizer.decode(_in_range(prompt, state)) if body.echo else "")
    return ids, echoes


def _in_range(ids: Sequence[int], state: ServerState) -> Sequence[int]:
    limit = state.service.info.vocab_size
    for token in ids:
        if token >= limit:
            raise InvalidParameter("prompt", f"prompt has token id {token}; the vocabulary is 0..{limit - 1}")
    return ids


def _rid(body: CompletionRequest, index: int, count: int) -> str:
    if body.rid is None:
        return ""
    return body.rid if count == 1 else f"{body.rid}_{index}"


class _Completion:
    """One completion response on its way out. Choice i of prompt p has index p * n + i."""

    def __init__(self, state: ServerState, body: CompletionRequest, generation: Generation, echoes: list[str]):
        self._tokenizer = state.tokenizer
        self._model = body.model or state.model_name
        self._generation = generation
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(generation.created)
        self._n = generation.requests[0].params.n
        self._echoes = echoes if body.echo else [""] * len(generation.requests)
        self._logprobs = body.logprobs is not None
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage = UsageCounter(generation.requests)
        count = self._n * len(generation.requests)
        self._started = [False] * count
        self._offsets = [0] * count  # characters of logprob tokens so far

    async def completion(self) -> Completion:
        count = len(self._started)
        texts, scores = [""] * count, [CompletionLogprobs([], [], [], []) for _ in range(count)]
        finish: list[Any] = [None] * count
        async for updates in self._generation.updates():
            for update in updates:
                i, text, logprobs = self._news(update)
                texts[i] += text
                if logprobs is not None:
                    for name in logprobs.__struct_fields__:
                        getattr(scores[i], name).extend(getattr(logprobs, name))
                finish[i] = update.finish and update.finish.type
        choices = [
            CompletionChoice(i, texts[i], scores[i] if self._logprobs else None, finish[i]) for i in range(count)
        ]
        return Completion(self._id, "text_completion", self._created, self._model, choices, self._usage.total())

    async def events(self) -> AsyncIterator[bytes]:
        write = ChunkWriter(self._id, "text_completion", self._created, self._model, self._include_usage)
        async for updates in self._generation.updates():
            data = b""
            for update in updates:
                i, text, logprobs = self._news(update)
                finish = update.finish.type if update.finish else None
                if text or logprobs is not None or finish is not None:
                    data += write.text(i, text, logprobs, finish)
            if data:
                yield data
        if self._include_usage:
            yield write.usage(self._usage.total())
        yield DONE

    def _news(self, update: Update) -> tuple[int, str, CompletionLogprobs | None]:
        """The choice's index, its new text and logprobs; the prompt's come before the first of them."""
        self._usage.add(update)
        i = update.prompt * self._n + update.choice
        text, tokens, scores = update.text, update.token_ids, list[TokenLogprobs | None](update.logprobs)
        if not self._started[i]:
            self._started[i] = True
            text = self._echoes[update.prompt] + text
            if update.prompt_logprobs is not None:
                tokens = [*self._generation.requests[update.prompt].prompt_ids, *tokens]
                scores = [*update.prompt_logprobs, *scores]
        if not self._logprobs or not tokens:
            return i, text, None
        found = completion_logprobs(self._tokenizer, tokens, scores, self._offsets[i])
        self._offsets[i] = found.text_offset[-1] + len(found.tokens[-1])
        return i, text, found


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None], offset: int
) -> CompletionLogprobs:
    found = CompletionLogprobs([], [], [], [])
    for token, score in zip(tokens, scores, strict=True):
        text = tokenizer.token_text(token)
        found.tokens.append(text)
        found.text_offset.append(offset)
        offset += len(text)
        if score is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            continue
        best = {text: finite(score.logprob)}  # the token itself is always among them, as in OpenAI's answers
        for other, logprob in zip(score.top_ids, score.top_logprobs, strict=True):
            best.setdefault(tokenizer.token_text(other), finite(logprob))
        found.token_logprobs.append(finite(score.logprob))
        found.top_logprobs.append(best)
    return found
