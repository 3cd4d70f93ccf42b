"""A server in this process: uvicorn in a thread on a free port, an engine core without a model behind it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import openai
import uvicorn
import uvloop

from fakes.fake_core import FakeCore
from sgl_jax.engine.messages import Command
from sgl_jax.engine.service import GenerationService
from sgl_jax.engine.transport import ThreadTransport
from sgl_jax.observability.request_tracer import RequestTracer
from sgl_jax.server.app import create_app
from sgl_jax.server.connection import Limits, http_config
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer

MODEL = str(Path(__file__).parents[1] / "data" / "stories260k")
TEMPLATE = Path(__file__).parent / "plain_template.jinja"


def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL, str(TEMPLATE))


class EncodingTransport(ThreadTransport):
    """Encodes and decodes commands, as on the way to another process."""

    def send(self, command: Command) -> None:
        super().send(msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command))


class LiveServer:
    """Server as a context manager. `core` is the fake engine, which keeps every command that it was sent."""

    def __init__(
        self,
        build_core: Callable[[], FakeCore] = FakeCore,
        *,
        open_service: bool = True,
        limits: dict[str, Any] | None = None,
        **server_args: Any,
    ):
        self._build_core, self._open_service = build_core, open_service
        self._limits = {"connections": 1000} | (limits or {})
        server_args = {"served_model_name": "stories", "chat_template": str(TEMPLATE)} | server_args
        self.args = ServerArgs(model_path=MODEL, **server_args)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()))

    def _core(self) -> FakeCore:
        self.core = self._build_core()
        return self.core

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = GenerationService(
            EncodingTransport(self._core),
            load_tokenizer(MODEL, self.args.chat_template),
            stream_interval=self.args.stream_interval,
            max_queued_requests=self.args.max_queued_requests,
            lora_dir=self.args.lora_dir,
        )
        if self._open_service:
            await self.service.start()
            self.service.open()
        tracer = RequestTracer(self.args.otlp_traces_endpoint) if self.args.otlp_traces_endpoint else None
        self.app = create_app(self.service, self.args, tracer)
        limits = Limits(self.args.max_request_bytes, **self._limits)
        self._http = uvicorn.Server(http_config(self.app, limits, last_words_s=1))
        self._http.capture_signals = _no_signals  # only the main thread may have handlers
        serving = asyncio.ensure_future(self._http.serve(sockets=[self._listener]))
        while not self._http.started:
            await asyncio.sleep(0.005)
        self._started.set()
        await serving
        await self.service.close()
        if tracer is not None:
            tracer.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.should_exit = True
        self._thread.join()
        self._listener.close()

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20)

    def in_loop(self, call: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(call)


class _no_signals:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
