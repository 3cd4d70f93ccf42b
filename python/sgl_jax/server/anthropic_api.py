"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's API."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.server.answer_formats import chat_formats
from sgl_jax.server.anthropic_answer import MessagesAnswer
from sgl_jax.server.anthropic_request import as_chat
from sgl_jax.server.anthropic_types import AnsweredMessage, CountTokensRequest, MessagesRequest, TokenCount
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.documentation import BODY, STREAM, documented
from sgl_jax.server.openai_chat import submitted
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.tool_choice import callables


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Anthropic"])

    def chat_of(body: CountTokensRequest) -> ChatCompletionRequest:
        template = state.chat_template(body.tools or ()).source
        return as_chat(body, chat_formats(state.server_args, template, state.tokenizer).thoughts is not None)

    @routes.post("/v1/messages", **documented(AnsweredMessage, 404, *STREAM))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        return await (await submitted(state, chat_of(body), MessagesAnswer)).respond(request)

    @routes.post("/v1/messages/count_tokens", **documented(TokenCount, 404, *BODY))
    async def count_tokens(body: CountTokensRequest) -> Response:
        chat = chat_of(body)
        state.adapter_of(chat.model)
        prompt = await state.render_chat(chat.messages, chat, callables(chat).shown)
        return json_response(TokenCount(len(await state.encode(prompt, "messages", add_special_tokens=False))))

    return routes
