"""Schema of the API, /openapi.json: requests from pydantic models, answers from msgspec structs, and errors. The page
/docs is made from it."""

from collections.abc import Collection
from importlib import resources
from typing import Any

import jinja2
import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, Response

from sgl_jax import __version__
from sgl_jax.server import anthropic_types, encoding_answers, responses
from sgl_jax.server.responses import ErrorResponse

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the page needs no script, nor another site
_REF = "#/components/schemas/{name}"
# Schema of one event: OpenAPI 3.1 cannot describe a stream of events, and tools take the schema for that of each.
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_JSON = "application/json"
_USUAL = (400, 401, 403, 500, 503)
BODY = (413, 415)  # errors about bodies
STREAM = (*BODY, 429)
_ERRORS = {
    400: "A value is wrong or not supported; `param` names the field",
    403: "The page or the name of the server is not allowed",
    401: "The API key is missing or wrong",
    404: "No such model or adapter",
    409: "It cannot be done in the state the engine is in; `message` says why",
    413: "The body is too large",
    415: "The body is compressed",
    429: "Too many requests are waiting",
    500: "The engine failed",
    503: "The engine is still starting, or the server is shutting down",
}


def documented(
    answer: type | None,
    *also: int,
    without: Collection[int] = (),
    other: type | None = None,
    or_list: bool = False,
    only_list: bool = False,
    streams: bool = True,
    media_type: str = _JSON,
) -> dict[str, Any]:
    """Document a route's answers: its own or the `other`, with `or_list` a list of such ones, too, with `only_list` nothing else, and
    the errors it can give, by their statuses: the usual ones but for those in `without`, and `also`. One that can give
    a 429 can stream, unless `streams` is false."""
    schema: dict[str, Any] = {"type": "string"} if answer is None else {"$ref": _REF.format(name=answer.__name__)}
    if other is not None:
        schema = {"anyOf": [schema, {"$ref": _REF.format(name=other.__name__)}]}
    several = {"type": "array", "items": schema}
    schema = several if only_list else {"anyOf": [schema, several]} if or_list else schema
    content = {media_type: {"schema": schema}} | (
        {"text/event-stream": {"schema": _EVENT}} if streams and 429 in also else {}
    )
    envelope = {_JSON: {"schema": {"$ref": _REF.format(name=ErrorResponse.__name__)}}}
    statuses = sorted({*_USUAL, *also} - {*without})
    errors = {status: {"description": _ERRORS[status], "content": envelope} for status in statuses}
    return {"responses": {200: {"description": "Success", "content": content}, **errors}, "response_model": None}


def install(app: FastAPI) -> None:
    """Replace the generated document, which would promise FastAPI's own 422 answers, and serve the page."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=__version__, description=app.description, routes=app.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            found = [*vars(responses).values(), *vars(anthropic_types).values(), *vars(encoding_answers).values()]
            structs = [v for v in found if isinstance(v, type) and issubclass(v, msgspec.Struct)]
            schemas.update(msgspec.json.schema_components(structs, ref_template=_REF)[1])
            app.openapi_schema = document
        return app.openapi_schema

    source = resources.files("sgl_jax.server").joinpath("docs.html.jinja").read_text(encoding="utf-8")

    async def docs(_: Request) -> Response:
        page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
        return HTMLResponse(page.render(openapi()), headers={"Content-Security-Policy": _POLICY})

    app.openapi = openapi
    app.add_route("/docs", docs, include_in_schema=False)
