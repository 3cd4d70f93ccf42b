"""Every error leaves as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sgl_jax.engine.generation import (
    Conflict,
    DuplicateRequestId,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    ServiceUnavailable,
)
from sgl_jax.request import InvalidParameter
from sgl_jax.server.bodies import feature_of
from sgl_jax.server.responses import ErrorBody, ErrorResponse
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import TokenizerError

logger = logging.getLogger(__name__)

_BAD_REQUEST = "invalid_request_error"


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, message: str, type: str = _BAD_REQUEST, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.body = ErrorResponse(ErrorBody(_printable(message), type, param and _printable(param), code))

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        found = dict(headers or {})
        if self.status in (429, 503):
            found["Retry-After"] = "1"
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return Response(self.encoded(), self.status, found, media_type="application/json")

    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # a client may send lone surrogates; JSON cannot carry them


def unknown_model(name: str, served: str) -> ApiError:
    message = f"the model {name} does not exist; this server has {served}"
    return ApiError(404, message, param="model", code="model_not_found")


def as_api_error(error: Exception) -> ApiError | None:
    """Returns the answer to an error of ours; None for one that nobody expected."""
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case DuplicateRequestId():
            return ApiError(400, str(error), param=error.param, code="duplicate_request_id")
        case InvalidParameter():
            return ApiError(400, str(error), param=error.param, code="invalid_value")
        case TokenizerError():
            return ApiError(400, str(error), param="prompt", code="invalid_value")
        case TemplateError():
            return ApiError(400, str(error), param="messages", code="invalid_value")
        case QueueFull():
            return ApiError(429, str(error), type="rate_limit_error", code="queue_full")
        case Conflict():
            return ApiError(409, str(error), code="conflict")
        case ServiceUnavailable():
            return ApiError(503, str(error), type="service_unavailable", code="not_ready")
        case EngineFailed():
            return ApiError(500, str(error), type="server_error", code="engine_failed")
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException():
            return ApiError(error.status_code, _http_message(error), code=HTTPStatus(error.status_code).name.lower())
    return None


def _http_message(error: HTTPException) -> str:
    if error.status_code == 400:  # the framework's answer to a body that cannot be decoded
        return "the body is not valid JSON in UTF-8"
    if error.status_code == 404:
        return "no such path; see /docs for what there is"
    if error.status_code == 405:
        return f"this path does not take that method; it takes {(error.headers or {}).get('Allow', 'others')}"
    return str(error.detail)


def _validation_error(error: RequestValidationError) -> ApiError:
    # A value may fail every branch of a union; the branch that got furthest tells most.
    found = [(each, *_field(each["loc"][1:], error.body)) for each in error.errors()]
    first, field, _ = max(found, key=lambda item: item[2])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(
            400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="invalid_json"
        )
    if not field:
        return ApiError(
            400, "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_json"
        )
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden" if feature_of(field) is None:
            return ApiError(400, f"{field} is not a parameter of this request", param=field, code="unknown_parameter")
        case "extra_forbidden" | "none_required":
            return _unsupported(field)
        case "too_long" if context.get("max_length") == 0:
            return _unsupported(field)
        case "literal_error" if " or " not in context["expected"]:  # the one value that asks for nothing
            return _unsupported(field, first["input"])
        case "missing":
            return ApiError(400, f"{field} is missing", param=field, code="missing_parameter")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return ApiError(400, f"{field}: {first['msg']}; it is {first['input']}", param=field, code="invalid_value")
    return ApiError(400, f"{field}: {first['msg']}", param=field, code="invalid_value")


def _unsupported(field: str, value: object = None) -> ApiError:
    named = f"{field} {value}" if isinstance(value, str) else field
    reason = f": {feature} not built" if (feature := feature_of(named)) else ""
    return ApiError(400, f"{named} is not supported{reason}", param=field, code="unsupported_parameter")


def _field(loc: Sequence[Any], body: Any) -> tuple[str, int]:
    """messages[0].content, from a path that also names the branches of unions; and how many steps of it there are."""
    found, depth = "", 0
    for i, step in enumerate(loc):
        missing = isinstance(body, dict) and isinstance(step, str) and i == len(loc) - 1
        if isinstance(step, int) and isinstance(body, list) and 0 <= step < len(body):
            found, body = f"{found}[{step}]", body[step]
        elif isinstance(body, dict) and (step in body or missing):
            found, body = f"{found}.{step}" if found else str(step), body.get(step)
        else:
            continue
        depth += 1
    return found, depth


def install(app: FastAPI) -> None:
    """Makes the app answer every exception with the envelope."""

    async def answer(request: Request, error: Exception) -> Response:
        found = as_api_error(error)
        if found is None:
            logger.error("request to %s failed", request.url.path, exc_info=error)
            found = ApiError(500, "the server failed on this request; its log says more", type="server_error")
        return found.response(getattr(error, "headers", None))

    for kind in (
        ApiError,
        InvalidParameter,
        TokenizerError,
        TemplateError,
        QueueFull,
        Conflict,
        ServiceUnavailable,
        EngineFailed,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, answer)
