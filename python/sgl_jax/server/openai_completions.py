"""POST /v1/completions: text or token-id prompts, one or many, with echo and OpenAI's older logprobs format."""

import dataclasses
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.generation import FinishType, Generation, GenerationRequest
from sgl_jax.engine.native_params import finite
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.bodies import openai_params
from sgl_jax.server.documentation import documented
from sgl_jax.server.openai_stream import LogprobList, OpenAIAnswer
from sgl_jax.server.openai_types import CompletionRequest
from sgl_jax.server.responses import Completion, CompletionChoice, CompletionLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", **documented(Completion, stream=True, model=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        state.check_model(body.model)
        body.check_stream_options()
        given = _parameters(body)
        prompts = _prompts(body)
        asked = []
        for i, prompt in enumerate(prompts):
            ids = await state.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
            rid = body.rid if body.rid is None or len(prompts) == 1 else f"{body.rid}_{i}"
            asked.append(given.for_prompt(ids, "prompt", rid, body.cache_salt))
        generation = state.service.submit(asked, stream=bool(body.stream))
        echoes = [each if isinstance(each, str) else state.tokenizer.decode(each) for each in prompts if body.echo]
        return await _Completion(state, body, generation, echoes).respond(request)

    return routes


def _parameters(body: CompletionRequest) -> GenerationRequest:
    """Read the parameters. `echo` with `max_tokens` 0 scores the prompt and generates nothing."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens", "max_tokens is 0; it must be at least 1 unless echo is set")
    prompt_logprobs = body.logprobs if body.echo else None
    own = {"max_tokens": max(max_tokens, 1), "logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs}
    given = openai_params(body, own, {})
    if body.best_of not in (None, given.params.n):
        raise InvalidParameter("best_of", f"best_of is {body.best_of}; only n, which is {given.params.n}, is supported")
    return dataclasses.replace(given, score_only=max_tokens == 0)


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    given = body.prompt
    if isinstance(given, str):
        return [given]  # an empty text may be a BOS
    if not given:
        raise InvalidParameter("prompt", "prompt is an empty list; at least one token is needed")
    return [given] if isinstance(given[0], int) else given


class _Completion(OpenAIAnswer[CompletionLogprobs]):
    id_prefix, chunk_object = "cmpl", "text_completion"

    def __init__(self, state: ServerState, body: CompletionRequest, generation: Generation, echoes: list[str]):
        super().__init__(state, body, generation, body.logprobs is not None, echoes)
        self._offsets: dict[int, int] = {}  # by choice: characters of its tokens so far

    def scored(self, index: int, tokens: Sequence[int], scores: LogprobList) -> CompletionLogprobs:
        offset = self._offsets.get(index, 0)
        found = CompletionLogprobs([], [], [], [])
        for token, score in zip(tokens, scores, strict=True):
            text = self.tokenizer.token_text(token)
            found.tokens.append(text)
            found.text_offset.append(offset)
            offset += len(text)
            if score is None:
                found.token_logprobs.append(None)
                found.top_logprobs.append(None)
                continue
            best = {text: finite(score.logprob)}  # the token itself is always among them, as in OpenAI's answers
            for other, logprob in zip(score.top_ids, score.top_logprobs, strict=True):
                best.setdefault(self.tokenizer.token_text(other), finite(logprob))
            found.token_logprobs.append(finite(score.logprob))
            found.top_logprobs.append(best)
        self._offsets[index] = offset
        return found

    def answer(self, texts: list[str], scores: list[CompletionLogprobs | None], finish: list[FinishType]) -> Completion:
        choices = [CompletionChoice(i, text, scores[i], finish[i]) for i, text in enumerate(texts)]
        return Completion(self.id, "text_completion", self.created, self.model, choices, self.usage())

    def chunks(
        self, i: int, first: bool, text: str, scores: CompletionLogprobs | None, finish: FinishType | None
    ) -> bytes:
        if not text and scores is None and finish is None:
            return b""
        return self.chunk(i, b'"text":' + msgspec.json.encode(text), scores, finish)
