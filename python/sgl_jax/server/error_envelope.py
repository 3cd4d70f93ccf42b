"""Errors, which leave as OpenAI's envelope, {"error": {"message", "type", "param", "code"}}, or as that of the path's
API."""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from sgl_jax.engine import generation
from sgl_jax.engine.adapter_table import AdapterTable
from sgl_jax.request import InvalidParameter
from sgl_jax.server.bodies import feature_of
from sgl_jax.server.responses import ErrorBody, ErrorResponse
from sgl_jax.settings.not_built import feature_at
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import TokenizerError

logger = logging.getLogger(__name__)

_BAD_REQUEST = "invalid_request_error"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
ANTHROPIC = "/v1/messages"  # how paths of Anthropic's API begin
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

# By kind, the first that fits: status, type, code, and the param where the error does not name it.
_EXPECTED: Mapping[type[Exception], tuple[int, str, str, str | None]] = {
    generation.PromptTooLong: (400, _BAD_REQUEST, "context_length_exceeded", None),
    generation.UnknownAdapter: (404, _BAD_REQUEST, "model_not_found", None),
    generation.DuplicateRequestId: (400, _BAD_REQUEST, "duplicate_request_id", None),
    InvalidParameter: (400, _BAD_REQUEST, "invalid_value", None),
    TokenizerError: (400, _BAD_REQUEST, "invalid_value", "prompt"),
    TemplateError: (400, _BAD_REQUEST, "invalid_value", "messages"),
    generation.QueueFull: (429, "rate_limit_error", "queue_full", None),
    generation.Conflict: (409, _BAD_REQUEST, "conflict", None),
    generation.ServiceUnavailable: (503, "service_unavailable", "not_ready", None),
    generation.NotFinite: (500, "server_error", "not_finite", None),
    generation.EngineFailed: (500, "server_error", "engine_failed", None),
}


class ApiError(HTTPException):
    """An answer other than success."""

    retry_after = 1  # seconds, told with 429 and 503
    details: Mapping[str, str | Sequence[str]] | None = None  # for clients of Anthropic's API

    def __init__(
        self,
        status: int,
        message: str,
        type: str = _BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.status = status
        self.body = ErrorResponse(ErrorBody(_printable(message), type, param and _printable(param), code))

    def content(self, scope: Scope | None = None) -> bytes:
        """Return the error as the API of the request's path has it."""
        if scope is None or not scope["path"].startswith(ANTHROPIC):
            return msgspec.json.encode(self.body)
        said = self.body.error
        error = {"type": _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else _BAD_REQUEST)}
        details = {} if self.details is None else {"details": self.details}
        whole = {"type": "error", "error": {**error, "message": said.message, **details}}
        return msgspec.json.encode({**whole, "request_id": scope["state"].get("request_id")})

    def response(self, headers: Mapping[str, str] | None = None, scope: Scope | None = None) -> Response:
        found = {**(self.headers or {}), **(headers or {})}
        if self.status in (429, 503):
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return Response(self.content(scope), self.status, found, media_type="application/json")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a client may send lone surrogates; JSON cannot carry them


def unknown_model(name: str, served: str, adapters: AdapterTable) -> ApiError:
    known = adapters.names_text()
    message = f"the model {name} does not exist; this server has {served}" + (known and f" and the adapters {known}")
    if name.startswith(f"{served}:") and not adapters.enabled:
        message += "; --enable-lora makes it take LoRA adapters"
    return ApiError(404, message, param="model", code="model_not_found")


def answer_to(error: Exception, what: str) -> ApiError:
    """Return the answer to an error. One that nobody expected is logged as a failure of `what`."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException():
            code = HTTPStatus(error.status_code).name.lower()
            return ApiError(error.status_code, _http_message(error), code=code, headers=error.headers)
    for kind, (status, type, code, param) in _EXPECTED.items():
        if isinstance(error, kind):
            found = ApiError(status, str(error), type, param or getattr(error, "param", None), code)
            found.retry_after = getattr(error, "retry_after", found.retry_after)
            return found
    logger.error("%s failed", what, exc_info=error)
    return ApiError(500, "the server failed on this request; its log says more", type="server_error")


def _http_message(error: HTTPException) -> str:
    if error.status_code == 400:  # the framework's answer to a body that cannot be decoded
        return "the body is not valid JSON in UTF-8"
    if error.status_code == 404:
        return "no such path; see /docs for what there is"
    if error.status_code == 405:
        return f"this path does not take that method; it takes {(error.headers or {}).get('Allow', 'others')}"
    return str(error.detail)


def _validation_error(error: RequestValidationError) -> ApiError:
    # A value may fail every branch of a union; the error of the branch that got furthest says most.
    found = [(each, *_field(each["loc"], error.body, each["type"] == "missing")) for each in error.errors()]
    first, field, _ = max(found, key=lambda item: (item[2], item[0]["type"].startswith("union_tag")))
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        text = f"the body is not valid JSON: {reason} at character {first['loc'][-1]}"
        return ApiError(400, text, code="invalid_json")
    if first["type"] == "too_many_fields":
        return ApiError(400, f"{field or 'the body'}: {first['msg']}", param=field or None, code="invalid_value")
    if not field:
        text = "the body must be a JSON object, sent with Content-Type: application/json"
        return ApiError(400, text, code="invalid_json")
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden" if feature_of(field) is None:
            return ApiError(400, f"{field} is not a parameter of this request", param=field, code="unknown_parameter")
        case "extra_forbidden" | "none_required":
            return _unsupported(field)
        case "too_long" if context.get("max_length") == 0:
            return _unsupported(field)
        case "literal_error" if " or " not in context["expected"] or feature_of(field):  # other values are of a feature
            return _unsupported(field, first["input"])
        case "missing":
            return ApiError(400, f"{field} is missing", param=field, code="missing_parameter")
    return ApiError(400, f"{field}: {first['msg']}; it is {_shown(first['input'])}", param=field, code="invalid_value")


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}… ({len(text)} characters)"


def _unsupported(field: str, value: object = None) -> ApiError:
    named = f"{field} {value}" if isinstance(value, str) else field
    reason = f": {feature} not built" if (feature := feature_of(named)) else ""
    return ApiError(400, f"{named} is not supported{reason}", param=field, code="unsupported_parameter")


def _field(loc: Sequence[Any], body: Any, is_missing: bool) -> tuple[str, int]:
    """Return messages[0].content for a path that also names the branches of unions, and how many steps it has.
    Its first step says where the field is: in the body, or in the URL."""
    where, *loc = loc
    if where == "query":
        return str(loc[0]), 1
    found, depth = "", 0
    for i, step in enumerate(loc):
        missing = is_missing and i == len(loc) - 1
        if isinstance(step, int) and isinstance(body, list) and 0 <= step < len(body):
            found, body = f"{found}[{step}]", body[step]
        elif isinstance(body, dict) and (step in body or missing):
            found, body = f"{found}.{step}" if found else str(step), body.get(step)
        else:
            continue
        depth += 1
    return found, depth


def _methods(request: Request) -> set[str]:
    """Return the methods of all routes that have the request's path; a 405 itself knows those of the first one."""
    every = ((route, {**request.scope, "method": method}) for route in request.app.routes for method in _METHODS)
    return {scope["method"] for route, scope in every if route.matches(scope)[0] is Match.FULL}


def install(app: FastAPI) -> None:
    """Make the app answer every exception with the envelope."""

    async def answer(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, HTTPException) and error.status_code == 404 and (feature := feature_at(path)):
            error = ApiError(404, f"{path} is not supported: {feature} not built", code="unsupported_path")
        elif isinstance(error, HTTPException) and error.status_code == 405:
            methods = {"OPTIONS", *_methods(request)}
            allow = {"Allow": ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=allow)
            error = HTTPException(405, headers=allow)
        return answer_to(error, f"request to {path}").response(scope=request.scope)

    for kind in (RequestValidationError, HTTPException, Exception, *_EXPECTED):
        app.add_exception_handler(kind, answer)
