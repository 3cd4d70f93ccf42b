"""POST /v1/completions: text or token-id prompts, one or many, with echo and OpenAI's older logprobs format."""

import dataclasses
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.generation import Generation, GenerationRequest
from sgl_jax.engine.slices import in_slices
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.bodies import openai_params
from sgl_jax.server.completion_scores import CompletionScores, prompt_offsets
from sgl_jax.server.documentation import STREAM, documented
from sgl_jax.server.openai_stream import News, OpenAIAnswer
from sgl_jax.server.openai_types import CompletionRequest
from sgl_jax.server.responses import Completion, CompletionChoice, CompletionLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", **documented(Completion, 404, *STREAM))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        state.check_generates()
        adapter = state.adapter_of(body.model)
        body.check_stream_options()
        given = _parameters(body)
        prompts = _prompts(body)
        state.service.check_count(len(prompts), given.params.n, given.names)
        special = body.add_special_tokens is not False
        asked = []
        async for i, prompt in in_slices(enumerate(prompts)):
            ids = await state.encode(prompt, "prompt", special) if isinstance(prompt, str) else prompt
            rid = body.rid if body.rid is None or len(prompts) == 1 else f"{body.rid}_{i}"
            asked.append(given.for_prompt(ids, "prompt", rid, body.cache_salt, adapter))
        generation = await state.service.submit(asked, stream=bool(body.stream))
        return await _Completion(state, body, generation, prompts).respond(request)

    return routes


def _parameters(body: CompletionRequest) -> GenerationRequest:
    """Read the parameters. `echo` with `max_tokens` 0 scores the prompt and generates nothing."""
    prompt_logprobs = body.logprobs if body.echo else None
    own = {"max_tokens": body.max_tokens, "logprobs": body.logprobs, "prompt_logprobs": prompt_logprobs}
    grammar, names = body.grammar()
    given = dataclasses.replace(openai_params(body, own | grammar, names), default_max_tokens=DEFAULT_MAX_TOKENS)
    if body.best_of not in (None, given.params.n):
        raise InvalidParameter("best_of", f"best_of is {body.best_of}; only n, which is {given.params.n}, is supported")
    return given


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    given = body.prompt
    if isinstance(given, str):
        return [given]  # an empty text may be a BOS
    if not given:
        raise InvalidParameter("prompt", "prompt is an empty list; at least one token is needed")
    return [given] if isinstance(given[0], int) else given


class _Completion(OpenAIAnswer[CompletionLogprobs]):
    id_prefix, chunk_object = "cmpl", "text_completion"

    def __init__(
        self, state: ServerState, body: CompletionRequest, generation: Generation, prompts: Sequence[str | list[int]]
    ):
        super().__init__(state, body, generation, body.logprobs is not None)
        skip, decode = generation.requests[0].params.skip_special_tokens, self.tokenizer.decode
        if body.echo:
            self.echoes = [each if isinstance(each, str) else decode(each, skip) for each in prompts]
        self._scores: dict[int, CompletionScores] = {}  # by choice
        self._offsets: dict[int, list[int]] = {}  # by prompt, of its tokens in the echo

    def scored(self, news: News) -> CompletionLogprobs | None:
        if news.index not in self._scores:
            self._scores[news.index] = self._begin(news.prompt)
        return self._scores[news.index].add(news.tokens, news.scores, news.text, news.finish is not None)

    def _begin(self, prompt: int) -> CompletionScores:
        request, echo = self.generation.requests[prompt], self.echoes[prompt] if self.echoes else ""
        if prompt not in self._offsets:
            self._offsets[prompt] = prompt_offsets(self.tokenizer, request.prompt_ids, echo) if self.echoes else []
        return CompletionScores(self.tokenizer, request, self._offsets[prompt], len(echo))

    def answer(self, whole: list[News], scores: list[CompletionLogprobs | None]) -> Completion:
        choices = [CompletionChoice(i, news.text, scores[i], news.finish or "abort") for i, news in enumerate(whole)]
        return Completion(self.id, "text_completion", self.created, self.model, choices, self.usage())

    def chunks(self, news: News, scores: CompletionLogprobs | None) -> bytes:
        if not news.text and scores is None and news.finish is None:
            return b""
        return self.chunk(news.index, b'"text":' + msgspec.json.encode(news.text), scores, news.finish)
