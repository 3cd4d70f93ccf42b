"""A client of any server: its management calls, and one request measured from sending to the last token."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from sgl_jax.tools.benchmark.event_stream import EventParser
from sgl_jax.tools.benchmark.protocols import REQUEST_TIMEOUT_S, Protocol, Reading
from sgl_jax.tools.benchmark.records import Outcome
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_CONTROL_TIMEOUT_S = 600.0  # flushing a cache, writing a trace
_CONNECT_TIMEOUT_S = 60.0
_POLL_S = 0.5
_NOT_OFFERED = (404, 405, 501)  # HTTP statuses of a server without that path
_LONGEST_ERROR = 500  # characters of a server's answer that are shown


class ServerError(BenchmarkError):
    """An answer other than success, or none; `status` is 0 when no HTTP answer came."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status

    @property
    def not_offered(self) -> bool:
        """The server has no such path."""
        return self.status in _NOT_OFFERED


class Client:
    """Calls to one server. Each raises ServerError when it does not succeed."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, request_timeout_s: float):
        self._session = session
        self.base_url = base_url
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S)

    async def answer(self, path: str, body: bytes) -> Any:
        """A generation request's answer in one piece."""
        async with self._request("POST", path, body, self._timeout) as response:
            return _checked(await response.read())

    async def events(self, path: str, body: bytes) -> AsyncGenerator[Any]:
        """A stream's events. An error among them, or an end without [DONE], raises ServerError."""
        parser, done = EventParser(), False
        async with self._request("POST", path, body, self._timeout) as response:
            if response.content_type == "application/json":
                _checked(await response.read())
                raise ServerError("asked for a stream, the server answered in one piece")
            async for chunk in response.content.iter_any():
                for data in parser.feed(chunk):
                    if data == b"[DONE]":
                        done = True  # and on to the end of the body, so that the connection can be used again
                    elif not done:
                        yield _checked(data)
        if not done:
            raise ServerError("the stream ended early, without [DONE]")

    async def _control(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer; None when it is empty or no JSON."""
        timeout = aiohttp.ClientTimeout(total=_CONTROL_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S)
        data = None if body is None else msgspec.json.encode(body)
        async with self._request(method, path, data, timeout) as response:
            content = await response.read()
        try:
            return msgspec.json.decode(content)
        except msgspec.DecodeError:
            return None

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, data: bytes | None, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {} if data is None else {"Content-Type": "application/json"}
        url = self.base_url + path
        try:
            async with self._session.request(method, url, data=data, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    said = _error_text(await response.read()) or response.reason or ""
                    raise ServerError(f"HTTP {response.status} from {path}: {said}", response.status)
                yield response
        except aiohttp.ClientConnectorError as error:
            raise ServerError(f"no server answers at {self.base_url}: {_reason(error.os_error)}") from error
        except TimeoutError as error:
            raise ServerError(f"no complete answer from {path} within {timeout.total:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"the connection broke: {str(error) or type(error).__name__}") from error

    # --- what the tools ask of a server -------------------------------------------------------------------------------

    async def get_if_offered(self, path: str) -> Any:
        """None when the server has no such path."""
        try:
            return await self._control("GET", path)
        except ServerError as error:
            if error.not_offered:
                return None
            raise

    async def server_info(self) -> dict[str, Any]:
        """The answer of /get_server_info; empty when the server has none."""
        info = await self.get_if_offered("/get_server_info")
        return info if isinstance(info, dict) else {}

    async def model_name(self) -> str | None:
        """The first of /v1/models."""
        found = await self.get_if_offered("/v1/models")
        models = found.get("data") if isinstance(found, dict) else None
        return models[0].get("id") if models else None

    async def flush_cache(self) -> bool:
        """Whether the server has that."""
        try:
            await self._control("POST", "/flush_cache")
        except ServerError as error:
            if error.not_offered:
                return False
            raise
        return True

    async def start_profile(self, output_dir: str | None = None, num_steps: int | None = None) -> None:
        fields = {"output_dir": output_dir, "num_steps": num_steps}
        given = {name: value for name, value in fields.items() if value is not None}
        await self._control("POST", "/start_profile", given)

    async def stop_profile(self) -> None:
        await self._control("POST", "/stop_profile")

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Until requests are taken. Raises ServerError with the last answer after `timeout_s` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            try:
                if await self.get_if_offered("/ready") is None:
                    await self.get_if_offered("/health")
                return
            except ServerError as error:
                if loop.time() + _POLL_S > end:
                    raise ServerError(f"not ready after {timeout_s:g} s: {error}", error.status) from error
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def connect(
    base_url: str, headers: Mapping[str, str] | None = None, request_timeout_s: float = REQUEST_TIMEOUT_S
) -> AsyncIterator[Client]:
    """A client with as many connections as there are requests at a time. Nothing is sent yet."""
    # An idle connection is dropped before servers drop it (uvicorn after 5 s), so that no request meets its end.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield Client(session, base_url.rstrip("/"), request_timeout_s)


def allow_many_connections() -> None:
    """Lifts this process's limit of open files, each connection being one, as far as the system lets it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- one request ------------------------------------------------------------------------------------------------------


async def measured(client: Client, protocol: Protocol, body: bytes, prompt_len: int, stream: bool) -> Outcome:
    """Sends one request and follows its answer. A failure is told in the outcome, not raised."""
    outcome = Outcome(prompt_len, sent_s=asyncio.get_running_loop().time())
    reading = Reading()
    try:
        await (_stream if stream else _whole)(client, protocol, body, outcome, reading)
        if reading.aborted:
            raise ServerError(f"the server aborted the request: {reading.aborted}")
    except ServerError as error:
        outcome.error = str(error)
    except (AttributeError, LookupError, TypeError) as error:
        outcome.error = f"the answer is not one of {protocol.path}: {type(error).__name__}: {error}"
    outcome.text = reading.text
    outcome.prompt_tokens, outcome.cached_tokens = reading.prompt_tokens, reading.cached_tokens
    return outcome


async def _stream(client: Client, protocol: Protocol, body: bytes, outcome: Outcome, reading: Reading) -> None:
    now = asyncio.get_running_loop().time
    last, counted, length = outcome.sent_s, 0, 0
    async with aclosing(client.events(protocol.path, body)) as events:
        async for event in events:
            protocol.read(event, reading)
            if len(reading.text) == length:
                continue
            length = len(reading.text)
            # A chunk is a token unless the server counts.
            new = 1 if reading.output_tokens is None else reading.output_tokens - counted
            if outcome.ttft_s is None:
                outcome.ttft_s = now() - outcome.sent_s
            elif new < 1:  # text that was held back: its tokens are counted already
                continue
            else:
                outcome.itl_s += [(now() - last) / new] * new
            last, counted = now(), counted + max(new, 0)
    outcome.latency_s = now() - outcome.sent_s
    outcome.output_len = counted if reading.output_tokens is None else reading.output_tokens
    if outcome.ttft_s is None and outcome.output_len:
        outcome.ttft_s = outcome.latency_s  # tokens without any text: seen only when all were there


async def _whole(client: Client, protocol: Protocol, body: bytes, outcome: Outcome, reading: Reading) -> None:
    protocol.read(await client.answer(protocol.path, body), reading)
    outcome.latency_s = asyncio.get_running_loop().time() - outcome.sent_s
    if reading.output_tokens is None:
        raise ServerError("the answer does not say how many tokens it has; measure with a stream instead")
    outcome.output_len = reading.output_tokens


# --- errors in words --------------------------------------------------------------------------------------------------


def _reason(error: OSError) -> str:
    """ "Connection refused", where asyncio's own text only repeats the address."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


def _checked(content: bytes) -> Any:
    """The JSON of an answer or event, unless it is an error."""
    try:
        event = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ServerError(f"the server sent what is no JSON: {_error_text(content)}") from error
    if isinstance(event, dict) and (event.get("error") or event.get("object") == "error"):
        raise ServerError(f"the server answered an error: {_error_text(content)}")
    return event


def _error_text(content: bytes) -> str:
    """The message of an error in one of the shapes servers use, or the text as it is."""
    try:
        said = msgspec.json.decode(content)
    except msgspec.DecodeError:
        said = " ".join(content.decode("utf-8", "replace").split())
    if isinstance(said, dict):
        said = said.get("error") or said
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return str(said)[:_LONGEST_ERROR]
