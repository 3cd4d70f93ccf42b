"""POST /v1/chat/completions."""

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.generation import FinishType, GenerationRequest
from sgl_jax.engine.native_params import finite
from sgl_jax.request import InvalidParameter
from sgl_jax.server import responses
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.bodies import openai_params
from sgl_jax.server.documentation import STREAM, documented
from sgl_jax.server.openai_stream import News, OpenAIAnswer
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.responses import ChatCompletion, ChatLogprobs


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", **documented(ChatCompletion, 404, *STREAM))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        adapter = state.adapter_of(body.model)
        body.check_stream_options()
        given = _parameters(body)
        prompt_ids = await state.encode_chat(body.messages, body)
        asked = given.for_prompt(prompt_ids, "messages", body.rid, body.cache_salt, adapter)
        generation = await state.service.submit([asked], stream=bool(body.stream))
        return await _Chat(state, body, generation, bool(body.logprobs)).respond(request)

    return routes


def _parameters(body: ChatCompletionRequest) -> GenerationRequest:
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise InvalidParameter("max_tokens", "max_tokens and max_completion_tokens differ; give one")
    if body.top_logprobs and not body.logprobs:
        raise InvalidParameter("top_logprobs", "top_logprobs needs logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    grammar, spelled = body.grammar()
    names = spelled if body.max_completion_tokens is None else {**spelled, "max_tokens": "max_completion_tokens"}
    return openai_params(body, {"max_tokens": next(iter(limits), None), "logprobs": logprobs, **grammar}, names)


class _Chat(OpenAIAnswer[ChatLogprobs]):
    id_prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def scored(self, news: News) -> ChatLogprobs | None:
        content = []
        for token, score in zip(news.tokens, news.scores, strict=True):
            if score is not None:
                best = zip(score.top_ids, score.top_logprobs, strict=True)
                top = [responses.TopLogprob(*self._spelled(other, logprob)) for other, logprob in best]
                content.append(responses.ChatTokenLogprob(*self._spelled(token, score.logprob), top))
        return ChatLogprobs(content) if content or not self.stream else None

    def _spelled(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self.tokenizer.token_text(token), finite(logprob), list(self.tokenizer.token_bytes(token))

    def answer(self, texts: list[str], scores: list[ChatLogprobs | None], finish: list[FinishType]) -> ChatCompletion:
        choices = [
            responses.ChatChoice(i, responses.AssistantMessage("assistant", text), scores[i], finish[i])
            for i, text in enumerate(texts)
        ]
        return ChatCompletion(self.id, "chat.completion", self.created, self.model, choices, self.usage())

    def chunks(self, news: News, scores: ChatLogprobs | None) -> bytes:
        i = news.index
        found = self.chunk(i, b'"delta":{"role":"assistant","content":""}', None, None) if news.first else b""
        if news.text or scores is not None:
            found += self.chunk(i, b'"delta":{"content":' + msgspec.json.encode(news.text) + b"}", scores, None)
        return found if news.finish is None else found + self.chunk(i, b'"delta":{}', None, news.finish)
