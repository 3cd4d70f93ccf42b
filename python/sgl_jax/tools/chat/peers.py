"""Both who answer a chat: a server that runs, or an engine in this process. Each streams the chunks of OpenAI's chats."""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sgl_jax.engine.generation import Conflict, EngineFailed
from sgl_jax.observability import log
from sgl_jax.request import InvalidParameter, Json
from sgl_jax.settings.hub import HubError
from sgl_jax.settings.server_args import ServerArgs, environment
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import TokenizerError
from sgl_jax.tools.benchmark.arguments import engine_options

_LONGEST_ERROR = 500  # characters of a server's answer that are shown
_FIRST_TIMEOUT_S = 10.0  # until the model is named; answers may take as long as they like


type Chunk = dict[str, Any]


class ChatError(Exception):
    """An answer that cannot be had, told in one line."""


class Peer(Protocol):
    """Answerer of chats under the name `model`."""

    model: str

    def chunks(self, body: Mapping[str, Json]) -> Generator[Chunk]:
        """Yield the chunks of an answer. Closed early, it stops the answer. Raises ChatError."""
        ...

    def close(self) -> None: ...


class ServerPeer:
    """Server at a URL, with or without /v1 at its end."""

    def __init__(self, url: str, key: str | None, model: str | None):
        """Ask the server for its model's name unless `model` says it. Raises ChatError if none answers."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with self._open("/v1/models", None, _FIRST_TIMEOUT_S) as response, _told_if_broken():
            found = _read(response.read())
        models = found.get("data") or [{}]
        if model is None and "id" not in models[0]:
            raise ChatError(f"the server at {self._url} names no model in /v1/models; give --model-name")
        self.model: str = model or models[0]["id"]

    def chunks(self, body: Mapping[str, Json]) -> Generator[Chunk]:
        data = json.dumps({**body, "model": self.model, "stream": True}).encode()
        with self._open("/v1/chat/completions", data, None) as response, _told_if_broken():
            for line in response:
                name, _, value = line.partition(b":")
                if name == b"data" and value.strip() == b"[DONE]":
                    return
                if name == b"data":
                    yield _read(value)
        raise ChatError("the answer ended early, without [DONE]")

    def _open(self, path: str, data: bytes | None, timeout: float | None) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} from {path}: {_said(error.read())}"
            hint = "; --api-key or SGL_JAX_API_KEY gives the key" if error.code == 401 else ""
            raise ChatError(said + hint) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ChatError(
                f"no server answers at {self._url}: {getattr(reason, 'strerror', None) or reason}"
            ) from error

    def close(self) -> None:
        """Do nothing: a connection lasts as long as an answer."""


class EnginePeer:
    """Engine in this process, with the flags of a server."""

    def __init__(self, flags: Sequence[str], model: str | None):
        """Load the model. Raises ChatError if that fails, FlagError for a flag that is refused."""
        args = ServerArgs.from_cli(flags, {"SGL_JAX_LOG_LEVEL": "warning"} | environment())
        log.setup(args.log_level)
        from sgl_jax import Engine

        try:
            self._engine = Engine(**engine_options(args))
        except (EngineFailed, HubError, TokenizerError, TypeError) as error:
            raise ChatError(str(error)) from error
        self._named = {} if model is None else {"model": model}
        self.model = model or args.served_model_name or args.model_path

    def chunks(self, body: Mapping[str, Json]) -> Generator[Chunk]:
        fields = {**body, **self._named}
        messages: Any = fields.pop("messages")
        try:
            chunks: Any = self._engine.chat(messages, stream=True, **fields)
            for chunk in chunks:
                yield _checked(chunk)
        except (InvalidParameter, TemplateError, EngineFailed, Conflict) as error:
            raise ChatError(str(error)) from error

    def close(self) -> None:
        self._engine.shutdown()


@contextlib.contextmanager
def _told_if_broken() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ChatError(f"the connection broke: {str(error) or type(error).__name__}") from error


def _read(content: bytes) -> Chunk:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ChatError(f"the server sent what is no JSON: {_said(content)}") from error
    if not isinstance(found, dict):
        raise ChatError(f"the server sent what is no JSON object: {_said(content)}")
    return _checked(found)


def _checked(chunk: Chunk) -> Chunk:
    """Return the chunk. Raises ChatError for an error that came in place of one."""
    if (error := chunk.get("error")) is not None:
        raise ChatError(str(error.get("message", error) if isinstance(error, dict) else error)[:_LONGEST_ERROR])
    return chunk


def _said(content: bytes) -> str:
    """Return the message of an error, or the text as it is."""
    try:
        said = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = " ".join(content.decode("utf-8", "replace").split())
    return str(said)[:_LONGEST_ERROR]
