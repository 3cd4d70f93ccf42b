"""/v1/responses, of OpenAI's API: create, retrieve, cancel, delete."""

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState, json_response
from sgl_jax.server.chat_turns import Fields
from sgl_jax.server.documentation import STREAM, documented
from sgl_jax.server.openai_chat import submitted
from sgl_jax.server.openai_responses_answer import ResponseAnswer
from sgl_jax.server.openai_responses_request import Asked, as_chat
from sgl_jax.server.openai_responses_types import ResponsesRequest
from sgl_jax.server.responses import DeletedResponse, ItemList, ResponseObject
from sgl_jax.server.stored_responses import StoredResponses

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query()]


def router(state: ServerState) -> APIRouter:
    routes, store = APIRouter(tags=["OpenAI"]), StoredResponses()

    @routes.post("/v1/responses", **documented(ResponseObject, 404, *STREAM))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        state.check_generates()
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
        return json_response(store.shown(response_id))

    @routes.get("/v1/responses/{response_id}/input_items", **documented(ItemList, 404))
    async def list_input_items(
        response_id: str, request: Request, limit: Limit = 20, order: Order = "desc", after: str | None = None
    ) -> Response:
        for name in request.query_params.keys() - {"limit", "order", "after"}:
            raise InvalidParameter(name, f"{name} is not supported: items are given whole, by limit, order and after")
        items = store.input(response_id)
        return json_response(_page(items if order == "asc" else items[::-1], limit, after))

    @routes.post("/v1/responses/{response_id}/cancel", **documented(ResponseObject, 404))
    async def cancel_response(response_id: str) -> Response:
        return json_response(await store.cancelled(response_id, lambda: state.service.abort(response_id)))

    @routes.delete("/v1/responses/{response_id}", **documented(DeletedResponse, 404))
    async def delete_response(response_id: str) -> Response:
        store.delete(response_id)
        return json_response(DeletedResponse(response_id))

    return routes


def _page(items: Sequence[Fields], limit: int, after: str | None) -> ItemList:
    """Return the items behind the one with the id `after`, or the first ones. Raises InvalidParameter."""
    ids = [str(each["id"]) for each in items]
    if after is not None and after not in ids:
        raise InvalidParameter("after", f"after is {after[:100]}, which is no item of this response's input")
    start = 0 if after is None else ids.index(after) + 1
    shown = slice(start, start + limit)
    first, last = (ids[shown] or [None])[0], (ids[shown] or [None])[-1]
    return ItemList([*items[shown]], first, last, start + limit < len(items))


def _check_unicode(body: ResponsesRequest) -> None:
    """Raise InvalidParameter for text that no answer can repeat."""
    try:
        msgspec.json.encode(body.model_dump(by_alias=True))
    except UnicodeEncodeError as error:
        raise InvalidParameter("input", "the body has a lone surrogate, which is not valid Unicode") from error
