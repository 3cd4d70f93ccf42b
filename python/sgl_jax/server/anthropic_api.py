"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's API."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.server.anthropic_answer import MessagesAnswer
from sgl_jax.server.anthropic_request import as_chat
from sgl_jax.server.anthropic_types import AnsweredMessage, CountTokensRequest, MessagesRequest, TokenCount
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.documentation import BODY, STREAM, documented
from sgl_jax.server.error_envelope import ApiError
from sgl_jax.server.openai_chat import submitted
from sgl_jax.server.openai_types import ChatCompletionRequest
from sgl_jax.server.tool_choice import callables

_MOST_COUNTED = 4 << 20  # tokens: more than any context has, so that a client learns by how much a prompt is too long


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["Anthropic"])

    def chat_of(body: CountTokensRequest) -> ChatCompletionRequest:
        state.check_generates()
        if body.thread is not None:
            error = ApiError(400, "thread is not supported: there are no threads", param="thread")
            error.details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            raise error
        return as_chat(body, thinks=state.chat_formats(body.tools or ()).thoughts is not None)

    @routes.post("/v1/messages", **documented(AnsweredMessage, 404, *STREAM))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        chat = chat_of(body)
        if body.max_tokens >= state.service.info.context_length:
            chat.max_tokens = None  # as many as fit
        return await (await submitted(state, chat, MessagesAnswer)).respond(request)

    @routes.post("/v1/messages/count_tokens", **documented(TokenCount, 404, *BODY))
    async def count_tokens(body: CountTokensRequest) -> Response:
        chat = chat_of(body)
        state.adapter_of(chat.model)
        prompt = await state.render_chat(chat.messages, chat, callables(chat).shown, _MOST_COUNTED)
        return json_response(TokenCount(len(await state.encode(prompt, "messages", False, _MOST_COUNTED))))

    return routes
