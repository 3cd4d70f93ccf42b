"""A client of any server: its management calls, and one request measured from sending to the last token."""

import argparse
import asyncio
import os
import resource
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from sgl_jax.engine.messages import DraftCounts
from sgl_jax.tools.benchmark.protocols import BACKENDS, Outcome, Protocol
from sgl_jax.tools.benchmark.terminal import BenchmarkError, say

_TIMEOUT_S = 6 * 3600.0
_CONNECT_TIMEOUT_S = 60.0
_NOT_OFFERED = (404, 405, 501)  # HTTP statuses of a server without that path
_LONGEST_ERROR = 500  # characters of a server's answer that are shown


class ServerError(BenchmarkError):
    """An answer other than success, or none; `status` is 0 when no HTTP answer came."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class Client:
    """Calls to one server. Each raises ServerError when it does not succeed."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str):
        self._session, self._base_url = session, base_url

    async def events(self, path: str, body: bytes, stream: bool = True) -> AsyncGenerator[Any]:
        """Yield the events of a generation request's stream, or its answer in one piece.

        An error among them, or an end without [DONE], raises ServerError.
        """
        rest, done = b"", False
        async with self._request("POST", path, body) as response:
            if not stream or response.content_type == "application/json":
                answer = _checked(await response.read())
                if stream:
                    raise ServerError("asked for a stream, the server answered in one piece")
                yield answer
                return
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    name, _, value = line.partition(b":")
                    if done or name != b"data":
                        continue  # on to the end of the body, so that the connection can be used again
                    if value.strip() == b"[DONE]":
                        done = True
                    else:
                        yield _checked(value)
        if not done:
            raise ServerError("the stream ended early, without [DONE]")

    @asynccontextmanager
    async def _request(self, method: str, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, self._base_url + path, data=data, headers=headers) as response:
                if response.status != 200:
                    said = _error_text(await response.read()) or response.reason or ""
                    raise ServerError(f"HTTP {response.status} from {path}: {said}", response.status)
                yield response
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno or 0  # asyncio's own text only repeats the address
            reason = os.strerror(number) if number > 0 else str(error.os_error)
            raise ServerError(f"no server answers at {self._base_url}: {reason}") from error
        except TimeoutError as error:
            raise ServerError(f"no complete answer from {path} within {_TIMEOUT_S:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"the connection broke: {str(error) or type(error).__name__}") from error

    async def control(self, method: str, path: str, body: Any = None, *, optional: bool = False) -> Any:
        """Return the JSON of the answer to a management call, {} when it is no JSON. `optional`: None when the server has no such path."""
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with self._request(method, path, data) as response:
                return msgspec.json.decode(await response.read())
        except msgspec.DecodeError:
            return {}
        except ServerError as error:
            if optional and error.status in _NOT_OFFERED:
                return None
            raise

    async def server_info(self) -> dict[str, Any]:
        """Return the answer of /get_server_info; empty when the server has none."""
        info = await self.control("GET", "/get_server_info", optional=True)
        return info if isinstance(info, dict) else {}

    async def draft_counts(self) -> DraftCounts:
        """Return the drafts verified since the server's start, by its counters in /metrics; zeros where it has none."""
        totals: dict[str, float] = defaultdict(float)
        with suppress(ServerError, ValueError):
            async with self._request("GET", "/metrics", None) as response:
                text = (await response.read()).decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:  # vLLM's prefix is another, and each of its engines has a sample
                    totals[sample.name.rpartition("spec_decode_")[2]] += sample.value
        names = ("drafts", "draft_tokens", "accepted_tokens")
        return DraftCounts(*(int(totals[f"num_{name}_total"]) for name in names))

    async def model_name(self) -> str | None:
        """Return the first name in /v1/models; None when there is none."""
        found = await self.control("GET", "/v1/models", optional=True)
        models = found.get("data") if isinstance(found, dict) else None
        return models[0].get("id") if models else None

    async def flush_cache(self) -> bool:
        """Empty the prefix cache. Returns False if the server cannot."""
        return await self.control("POST", "/flush_cache", optional=True) is not None

    @asynccontextmanager
    async def profile(self, output_dir: str | None, num_steps: int | None = None) -> AsyncIterator[None]:
        """Record a profile while the block runs, of so many steps at most."""
        fields = {"output_dir": output_dir, "num_steps": num_steps}
        await self.control("POST", "/start_profile", {name: v for name, v in fields.items() if v is not None})
        try:
            yield
        finally:
            try:
                await self.control("POST", "/stop_profile")
            except ServerError as error:  # it has ended by itself, after num_steps
                say("profile", f"it could not be stopped: {error}")


def base_url(args: argparse.Namespace) -> str:
    host = f"[{args.host}]" if ":" in args.host else args.host
    return (args.base_url or f"http://{host}:{args.port or BACKENDS[args.backend].port}").rstrip("/")


@asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncIterator[Client]:
    """Open a client with as many connections as there are requests at a time. Nothing is sent yet.

    The process's limit of open files, each connection being one, is lifted as far as the system lets it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Each request has a connection of its own: some servers, llama.cpp's among them, close one that has just been used.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S)
    headers = dict(text.split("=", 1) for text in args.header)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield Client(session, base_url(args))


async def measured(client: Client, protocol: Protocol, body: bytes, prompt_len: int, stream: bool) -> Outcome:
    """Send one request and follow its answer. A failure is told in the outcome, not raised."""
    now = asyncio.get_running_loop().time
    outcome = Outcome(prompt_len, sent_s=now())
    last, counted, length = outcome.sent_s, 0, 0
    try:
        async with aclosing(client.events(protocol.path, body, stream)) as events:
            async for event in events:
                protocol.read(event, outcome)
                if len(outcome.text) == length or not stream:
                    continue
                length = len(outcome.text)
                # A chunk is a token unless the server counts.
                new = 1 if outcome.output_tokens is None else outcome.output_tokens - counted
                if outcome.ttft_s is None:
                    outcome.ttft_s = now() - outcome.sent_s
                elif new < 1:  # text that was held back: its tokens are counted already
                    continue
                else:
                    outcome.itl_s += [(now() - last) / new] * new
                last, counted = now(), counted + max(new, 0)
        outcome.latency_s = now() - outcome.sent_s
        outcome.output_len = counted if outcome.output_tokens is None else outcome.output_tokens
        if stream and outcome.ttft_s is None and outcome.output_len:
            outcome.ttft_s = outcome.latency_s  # tokens without any text: seen only when all were there
        if outcome.aborted:
            raise ServerError(f"the server aborted the request: {outcome.aborted}")
        if not stream and outcome.output_tokens is None:
            raise ServerError("the answer does not say how many tokens it has; measure with a stream instead")
    except ServerError as error:
        outcome.error = str(error)
    except (AttributeError, LookupError, TypeError) as error:
        outcome.error = f"the answer is not one of {protocol.path}: {type(error).__name__}: {error}"
    return outcome


def _checked(content: bytes) -> Any:
    """Return the JSON of an answer or event. Raises ServerError for an error."""
    try:
        event = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ServerError(f"the server sent what is no JSON: {_error_text(content)}") from error
    if isinstance(event, dict) and (event.get("error") or event.get("object") == "error"):
        raise ServerError(f"the server answered an error: {_error_text(content)}")
    return event


def _error_text(content: bytes) -> str:
    """Return the message of an error in one of the shapes servers use, or the text as it is."""
    with suppress(msgspec.DecodeError, AttributeError):
        said = msgspec.json.decode(content)
        said = said.get("error", said)
        said = said if isinstance(said, str) else said.get("message") or said.get("detail") or said
        return str(said)[:_LONGEST_ERROR]
    return " ".join(content.decode("utf-8", "replace").split())[:_LONGEST_ERROR]
