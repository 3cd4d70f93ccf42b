"""POST /v1/chat/completions."""

from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.engine.generation import Generation, GenerationRequest
from sgl_jax.engine.native_params import finite
from sgl_jax.request import InvalidParameter
from sgl_jax.server import responses
from sgl_jax.server.answer_formats import answer_format, shown_tokens
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.bodies import openai_params
from sgl_jax.server.chat_choice import ChoiceReader
from sgl_jax.server.chat_grammar import bound
from sgl_jax.server.documentation import STREAM, documented
from sgl_jax.server.openai_stream import News, OpenAIAnswer
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.responses import ChatCompletion, ChatLogprobs, Usage
from sgl_jax.server.tool_choice import callables
from sgl_jax.text.tool_calls.scanner import AnswerFormat


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", **documented(ChatCompletion, 404, *STREAM))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await (await submitted(state, body)).respond(request)

    return routes


type Make = Callable[[ServerState, ChatCompletionRequest, Generation, AnswerFormat | None], "ChatAnswer"]


async def submitted(state: ServerState, body: ChatCompletionRequest, made: Make | None = None) -> "ChatAnswer":
    """Submit a chat and return its answer, which is on its way. Raises InvalidParameter, TemplateError, ApiError and
    what `GenerationService.submit` raises."""
    state.check_generates()
    adapter = state.adapter_of(body.model)
    body.check_stream_options()
    given, tools = _parameters(body), callables(body)
    formats = state.chat_formats(tools.shown)
    if not (formats.marked or tools.must_call):  # no grammar could keep the model from others that it sees
        tools = tools.without_others()
    prompt = await state.render_chat(body.messages, body, tools.shown)
    form = answer_format(formats, body, tools.shown, prompt)
    if body.logprobs and body.include_reasoning is False and form and form.thoughts and not form.show_thoughts:
        raise InvalidParameter(
            "logprobs", "logprobs: true would spell the thought that include_reasoning: false hides; leave out one"
        )
    prompt_ids = await state.encode(prompt, "messages", bool(body.add_special_tokens))
    given = bound(given, body, tools, formats, prompt)
    given.shown_tokens = shown_tokens(form, formats, state.tokenizer)
    asked = given.for_prompt(prompt_ids, "messages", body.rid, body.cache_salt, adapter)
    generation = await state.service.submit([asked], stream=bool(body.stream))
    return (made or ChatAnswer)(state, body, generation, form)


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


class ChatAnswer(OpenAIAnswer[ChatLogprobs]):
    id_prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, generation: Generation, form: AnswerFormat | None
    ):
        super().__init__(state, body, generation, bool(body.logprobs))
        in_pieces, shown = body.stream_reasoning is not False, body.include_reasoning is not False
        request = generation.requests[0]
        skipped = self.tokenizer.special.keys() - request.shown_tokens if request.params.skip_special_tokens else ()
        self._choices = [ChoiceReader(form, self.tokenizer, skipped, in_pieces, shown) for _ in range(request.params.n)]
        self._thinks = form is not None and form.thoughts is not None

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

    def usage(self) -> Usage:
        found = super().usage()
        if self._thinks:
            num_tokens = sum(choice.num_thought_tokens for choice in self._choices)
            found.completion_tokens_details = responses.CompletionTokensDetails(num_tokens)
        return found

    def answer(self, whole: list[News], scores: list[ChatLogprobs | None]) -> ChatCompletion:
        choices = []
        for i, (choice, news) in enumerate(zip(self._choices, whole, strict=True)):
            message, finish = choice.message(news), choice.finish_reason(news.finish)
            choices.append(responses.ChatChoice(i, message, scores[i], finish))
        return ChatCompletion(self.id, "chat.completion", self.created, self.model, choices, self.usage())

    def chunks(self, news: News, scores: ChatLogprobs | None) -> bytes:
        i, choice = news.index, self._choices[news.index]
        found = self.chunk(i, b'"delta":{"role":"assistant","content":""}', None, None) if news.first else b""
        for delta in choice.deltas(news) or ([{"content": ""}] if scores is not None else []):
            found += self.chunk(i, b'"delta":' + msgspec.json.encode(delta), scores, None)
            scores = None
        finish = choice.finish_reason(news.finish)
        return found if finish is None else found + self.chunk(i, b'"delta":{}', None, finish)
