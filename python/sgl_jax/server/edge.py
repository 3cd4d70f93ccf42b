"""Layers around the application, which look at each request's head: its id and log line, web pages of other sites, and
rules that refuse it. The order and the reasons are in docs/features/http.md."""

import hmac
import ipaddress
import logging
import re
import string
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_jax.engine.generation import Generation
from sgl_jax.observability.log import QUIET_PATHS, access_line
from sgl_jax.server.connection import body_too_large
from sgl_jax.server.error_envelope import ANTHROPIC, ApiError
from sgl_jax.server.request_spans import RequestSpans
from sgl_jax.server.web_pages import is_page

logger = logging.getLogger(__name__)

type Rule = Callable[[Scope, Headers], ApiError | None]

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
_MOST_BODIES = 16  # bodies of the largest size that may be in memory at once
_SMALL = 64 * 1024  # bytes of a body that is always taken
_REQUEST_ID = re.compile(r"[!#-~]{1,128}")  # ASCII without space and quote, which the log line needs
_SHOWN = string.punctuation.replace('"', "")  # in an address, beside letters and digits
_HERE = r"https?://(localhost|[\w.-]+\.localhost|127(\.\d+){3}|\[::1\])(:\d+)?|(app|tauri|vscode-webview)://.*"


class RequestLog:
    """Gives each request an id, which its answer carries, counts its status, and writes its line when it has been answered, and
    its span if there are `spans`."""

    def __init__(self, app: ASGIApp, responses: Counter[int], spans: RequestSpans | None = None):
        self._app, self._responses, self._spans = app, responses, spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        started, status, ended = time.perf_counter(), 500, False

        async def noted(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in names)]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        # Each path is also taken with a slash behind it, and HEAD wherever GET is; the connection drops the body.
        path, is_head = scope["path"].rstrip("/") or "/", scope["method"] == "HEAD"
        names = [b"x-request-id", *([b"request-id"] if path.startswith(ANTHROPIC) else [])]  # as its clients call it
        scope["state"]["request_id"] = request_id
        inner = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}
        try:
            await self._app(inner, receive, noted)
        except Exception:
            if not ended:  # else it has been logged, and its answer is a 500
                raise
        finally:
            seconds = time.perf_counter() - started
            if path not in QUIET_PATHS and not is_page(path):
                self._responses[status] += 1
            if path not in QUIET_PATHS and logger.isEnabledFor(logging.INFO):
                _log(scope, status, seconds)
            if self._spans is not None:
                self._spans.record(scope, status, seconds)


def _log(scope: Scope, status: int, seconds: float) -> None:
    seen = scope["state"]
    generation: Generation | None = seen.get("generation")
    if generation is not None:
        tokens, adapters = (generation.num_prompt_tokens, generation.num_tokens), generation.adapters
    else:
        tokens, adapters = seen.get("tokens"), seen.get("adapters", ())
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    said = f"{scope['method']} {quote(scope['raw_path'] + query, safe=_SHOWN)} HTTP/{scope['http_version']}"
    logger.info("%s", access_line(scope["client"], said, status, seen["request_id"], tokens, seconds, adapters))


class Guard:
    """Refuses what a rule refuses, and bodies over the limits, of which it counts the bytes as they come."""

    def __init__(self, app: ASGIApp, rules: Sequence[Rule], max_body_bytes: int):
        self._app, self._rules, self._limit = app, rules, max_body_bytes
        self._num_bytes = 0  # in all bodies whose requests are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        for rule in self._rules:
            if refusal := rule(scope, headers):
                # A client that waits for "100 Continue" will not send its body, which the next request cannot follow.
                close = {"connection": "close"} if "expect" in headers else {}
                return await refusal.response(close, scope)(scope, receive, send)
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            new = len(message.get("body", b""))
            size += new
            self._num_bytes += new
            if size > self._limit:
                raise body_too_large(size, self._limit)
            if size > _SMALL and self._num_bytes > _MOST_BODIES * self._limit:
                text = f"requests of {self._num_bytes} bytes are being answered; try again later"
                raise ApiError(503, text, type="service_unavailable", code="too_many_bytes")
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._num_bytes -= size


class Pages(CORSMiddleware):
    """Tells browsers which sites' pages may call: those of this machine, and `origins`; "*" stands for all.

    `refuse`: a page of another site is refused and not only kept from reading answers, since any page may send a form.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], refuse: bool):
        super().__init__(
            app,
            allow_origins=origins,
            allow_origin_regex=_HERE,
            allow_methods=("GET", "HEAD", "OPTIONS", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("Retry-After", "X-Request-Id", "Request-Id"),
        )
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if (origin := headers.get("origin")) is None:
            return await self.app(scope, receive, send)
        ours = origin.partition("://")[2] == headers.get("host") or self.is_allowed_origin(origin)
        if self._refuse and not ours:
            return await _foreign(origin).response(scope=scope)(scope, receive, send)
        await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        found = super().preflight_response(request_headers)
        if found.status_code == 200:
            return found
        if not self.is_allowed_origin(request_headers["origin"]):
            return _foreign(request_headers["origin"]).response()
        return ApiError(400, bytes(found.body).decode(), code="cors").response()


def _foreign(origin: str) -> ApiError:
    text = f"pages of {origin[:200]} may not call this server; --allowed-origins allows it"
    return ApiError(403, text, param="origin", code="origin_not_allowed")


# --- rules ------------------------------------------------------------------------------------------------------------


def check_head(scope: Scope, headers: Headers) -> ApiError | None:
    """Refuse a request id that cannot be given back, and a request of HTTP/1.1 without a host or with two."""
    if (given := headers.get("x-request-id")) is not None and not _REQUEST_ID.fullmatch(given):
        text = f"x-request-id has {len(given)} characters; it must be 1 to 128 of ASCII, without spaces and quotes"
        return ApiError(400, text, param="x-request-id", code="invalid_value")
    hosts = len(headers.getlist("host"))
    if hosts != 1 and (hosts or scope["http_version"] == "1.1"):
        return ApiError(400, f"the request has {hosts} Host headers; it must have 1", param="host", code="bad_http")
    return None


def body_rule(limit: int) -> Rule:
    """Refuse bodies that are compressed, or say that they are too large."""

    def check(scope: Scope, given: Headers) -> ApiError | None:
        coding = given.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            text = f"content-encoding is {coding[:40]}; send the body as it is"
            headers = {"Accept-Encoding": "identity"}
            return ApiError(415, text, param="content-encoding", code="unsupported_encoding", headers=headers)
        size = int(given.get("content-length", 0))
        return body_too_large(size, limit) if size > limit else None

    return check


def key_rule(api_key: str) -> Rule:
    """Refuse requests without the key, except for health and for pages, which hold nothing and ask for the key."""
    expected = api_key.encode()

    def check(scope: Scope, headers: Headers) -> ApiError | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = [key] if scheme.lower() == "bearer" else []
        given += headers.getlist("x-api-key")  # Anthropic's clients
        if any(hmac.compare_digest(each.strip().encode("latin-1"), expected) for each in given):
            return None
        text = "the API key is missing or wrong; send it as Authorization: Bearer …, or as x-api-key"
        is_open = scope["path"] in OPEN_PATHS or is_page(scope["path"])
        return None if is_open else ApiError(401, text, code="invalid_api_key")

    return check


def host_rule(allowed: Collection[str]) -> Rule:
    """Refuse names that are neither this machine's nor allowed: a site may let its own name mean this machine, and its
    pages then read the answers (DNS rebinding). An address or a name without a dot is no site's."""

    def check(scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "localhost").lower()
        name = re.sub(r":\d*$", "", host).removesuffix(".")
        if name in allowed or "." not in name or name.endswith(".localhost") or scope["path"] in OPEN_PATHS:
            return None
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            text = f"Host is {host[:200]}, which is no name of this server; --allowed-hosts {name[:200]} allows it"
            return ApiError(403, text, param="host", code="host_not_allowed")
        return None

    return check
