"""Connections of clients: HTTP/1 as uvicorn speaks it, with limits on what a client sends and how long it takes."""

import asyncio
import contextlib
import functools
import logging
import resource
import uuid
from dataclasses import dataclass
from typing import Any, Literal, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sgl_jax.server.error_envelope import ApiError

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that the client closes them
_LINGER_S = 2  # a refused client's data is read and dropped so long: closing at once would lose the answer on its way
_DISCARDED = 4  # a body that was refused may be so many times the limit before its connection is cut
_PIPELINED = 4  # requests of a client that may wait, heads and 64 KiB of each body in memory, while one is answered
_INVALID = "this is no valid HTTP/1.1; the connection is closed"
_OTHER_DESCRIPTORS = 64  # files and sockets of the server that are no client's


@dataclass(frozen=True)
class Limits:
    body_bytes: int
    connections: int
    url_bytes: int = 16 * 1024
    head_bytes: int = 64 * 1024  # request line and headers, and whatever lies between two pieces of a body
    headers: int = 256
    head_s: float = 20.0
    body_s: float = 20.0  # the least rate of a body is measured over so many seconds
    bytes_per_s: int = 1024


def most_connections() -> int:
    """Raise this process's limit of open files to what it may be, and return how many clients that leaves room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS does not take its own "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(files - _OTHER_DESCRIPTORS, 16384)) if files != resource.RLIM_INFINITY else 16384


def http_config(app: ASGIApp, limits: Limits, last_words_s: int) -> uvicorn.Config:
    """Configure uvicorn. `last_words_s`: time for answers that are still being written at the end."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], functools.partial(Connection, limits)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=last_words_s,
    )


class _Refused(Exception):
    """Leaves the parser, which calls us, with the answer."""


class Connection(HttpToolsProtocol):
    """Connection of one client. A refused one gets its answer, if none has begun, and is closed."""

    def __init__(self, limits: Limits, **given: Any):  # by uvicorn
        super().__init__(**given)
        self._limits = limits
        self._part: Literal["head", "body"] | None = None  # a request that the client has begun to send
        self._due = 0.0  # when the client must have sent it, or, of a body, enough of it
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes that came since the parser gave us something
        self._num_headers = self._head_bytes = self._body_bytes = self._body_bytes_before = 0
        self._refusal: ApiError | None = None
        self._answering: RequestResponseCycle | None = None  # self.cycle is the last of requests that came in a row

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            text = f"there are {self._limits.connections} connections, which is the limit; try again later"
            self._refusal = ApiError(503, text, type="service_unavailable", code="too_many_connections")
            self._end(self._refusal, linger_s=0.01)
        else:
            self._expect("head", self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _stop(self._answering)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._unset_keepalive_if_required()
        if self._part is None and self._is_idle():
            self._expect("head", self._limits.head_s)
        self._unread += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._part == "head":
                self.data_received(self._without_offer() + data[offer.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.args[0] if isinstance(cause, _Refused) else ApiError(400, _INVALID, code="bad_http"))
        if self._part is not None and self._unread > self._limits.head_bytes and self._refusal is None:
            self._refuse(self._head_too_large())

    def _without_offer(self) -> bytes:
        """Write the request's head again without its offer to go on in another protocol, for which the parser stops:
        Java's client sends one with every first request."""
        kept = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join([line, *kept, b"", b""])

    # --- what the parser calls ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_headers = self._head_bytes = self._body_bytes = self._unread = 0
        self._expect("head", self._limits.head_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            text = f"the address of the request is longer than {self._limits.url_bytes} bytes; put less into it"
            raise _Refused(ApiError(414, text, code="uri_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._head_bytes += len(name) + len(value) + len(b": \r\n")
        if self._num_headers > self._limits.headers or self._head_bytes > self._limits.head_bytes:
            raise _Refused(self._head_too_large())
        if self._part == "head":  # behind a body headers may follow, too, which nobody here needs
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # it comes again
        super().on_headers_complete()
        if len(self.pipeline) < _PIPELINED:  # uvicorn would read on after the answer only, and not see a client go
            self.flow.resume_reading()
        if self.scope["http_version"] == "1.0":
            self.cycle.waiting_for_100_continue = False
        self._body_bytes_before = self._unread = 0
        self._expect("body", self._limits.body_s)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        self._body_bytes += len(body)
        if self._body_bytes > _DISCARDED * self._limits.body_bytes:
            raise _Refused(body_too_large(self._body_bytes, self._limits.body_bytes))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._part == "body":
            super().on_message_complete()
            self._part = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None and self._is_idle():
            self._end(self._refusal)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        whole = functools.partial(_without_chunks, app, cycle) if cycle.scope["http_version"] == "1.0" else app
        super()._start_asgi_task(cycle, whole)

    # --- time limits and refusals -------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect(self, part: Literal["head", "body"], seconds: float) -> None:
        self._part, self._due = part, self.loop.time() + seconds
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        if self._part is None or self.transport.is_closing():
            return
        enough = self._limits.bytes_per_s * self._limits.body_s
        if self.loop.time() < self._due:
            self._timer = self.loop.call_at(self._due, self._on_time)
        elif self.flow.read_paused or (self._part == "body" and self._body_bytes - self._body_bytes_before >= enough):
            self._body_bytes_before = self._body_bytes
            self._expect(self._part, self._limits.body_s)
        else:
            limit = f"{self._limits.head_s:g} s" if self._part == "head" else f"{self._limits.bytes_per_s} bytes per s"
            text = f"the request's {self._part} did not arrive in time; the limit is {limit}"
            self._refuse(ApiError(408, text, code="request_timeout"))

    def _head_too_large(self) -> ApiError:
        limits = f"{self._limits.head_bytes} bytes and {self._limits.headers} headers"
        return ApiError(431, f"the request's head is over the limit of {limits}; send less", code="head_too_large")

    def _refuse(self, error: ApiError) -> None:
        """Take no more from the client. What it asked for before a refused head is answered first."""
        self._refusal, cycle = error, self.cycle
        if self._is_idle() and self._part == "head":
            self._end(error)
        elif self._part == "body":
            begun = cycle.response_started or self.pipeline
            _stop(self._answering)
            self._end(None if begun else error)

    def _end(self, error: ApiError | None, linger_s: float = _LINGER_S) -> None:
        if error is None or self.transport.is_closing():
            self.transport.close()
            return
        logger.info("%s:%s - refused: %d %s", *(self.client or ("-", 0)), error.status, error.detail)
        answer = error.response({"connection": "close", "x-request-id": uuid.uuid4().hex})
        head = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + bytes(answer.body))
        with contextlib.suppress(OSError):  # the client may have gone
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(linger_s, self.transport.abort)


def _stop(cycle: RequestResponseCycle | None) -> None:
    """Let the app end its work, which may wait for the body; nothing that it still sends is written."""
    if cycle is not None:
        cycle.disconnected = True
        cycle.message_event.set()


def body_too_large(num_bytes: int, limit: int) -> ApiError:
    text = f"the body has {num_bytes} bytes or more; the limit is {limit} (--max-request-bytes)"
    return ApiError(413, text, code="body_too_large")


async def _without_chunks(
    app: ASGI3Application,
    cycle: RequestResponseCycle,
    scope: Scope,
    receive: ASGIReceiveCallable,
    send: ASGISendCallable,
) -> None:
    """Run the app for a client of HTTP/1.0, which knows no chunks: the connection's end is the answer's, where its
    length is not given."""
    known = False

    async def whole(message: ASGISendEvent) -> None:
        nonlocal known
        if message["type"] == "http.response.start":
            known = any(name == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if known else False
        elif message["type"] == "http.response.body" and not known:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, whole)
