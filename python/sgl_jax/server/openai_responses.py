"""/v1/responses, of OpenAI's API: create, retrieve, cancel, delete."""

import uuid
from functools import partial

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.documentation import STREAM, documented
from sgl_jax.server.openai_chat import submitted
from sgl_jax.server.openai_responses_answer import ResponseAnswer
from sgl_jax.server.openai_responses_request import Asked, as_chat
from sgl_jax.server.openai_responses_types import ResponsesRequest
from sgl_jax.server.responses import DeletedResponse, ResponseObject
from sgl_jax.server.stored_responses import StoredResponses


def router(state: ServerState) -> APIRouter:
    routes, store = APIRouter(tags=["OpenAI"]), StoredResponses()

    @routes.post("/v1/responses", **documented(ResponseObject, 404, *STREAM))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        before = body.previous_response_id
        earlier = [] if before is None else store.get(before, "previous_response_id").messages
        _check_unicode(body)
        asked = Asked(f"resp_{uuid.uuid4().hex}", body, store.resolved(body.input), earlier, store)
        chat = as_chat(asked, thinks=state.chat_formats(body.tools or ()).thoughts is not None)
        return await (await submitted(state, chat, partial(ResponseAnswer, asked=asked))).respond(request)

    @routes.get("/v1/responses/{response_id}", **documented(ResponseObject, 404))
    async def retrieve_response(response_id: str, request: Request) -> Response:
        for name in request.query_params.keys() & {"stream", "include", "starting_after"}:
            raise InvalidParameter(name, f"{name} is not supported: a stored response is given as it is")
        return json_response(store.get(response_id).response)

    @routes.post("/v1/responses/{response_id}/cancel", **documented(ResponseObject, 404))
    async def cancel_response(response_id: str) -> Response:
        return json_response(await store.cancelled(response_id, lambda: state.service.abort(response_id)))

    @routes.delete("/v1/responses/{response_id}", **documented(DeletedResponse, 404))
    async def delete_response(response_id: str) -> Response:
        store.delete(response_id)
        return json_response(DeletedResponse(response_id))

    return routes


def _check_unicode(body: ResponsesRequest) -> None:
    """Raise InvalidParameter for text that no answer can repeat."""
    try:
        msgspec.json.encode(body.model_dump(by_alias=True))
    except UnicodeEncodeError as error:
        raise InvalidParameter("input", "the body has a lone surrogate, which is not valid Unicode") from error
