"""The API process from the start of the engine process on: listen, get ready, serve, drain, end.

It listens while the engine loads (/health answers, everything else is 503), and prints the ready line only when requests
are taken. The first SIGTERM or SIGINT drains, the second stops at once. When the engine dies, every client gets an error
and the exit code is not zero.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
import uvloop

from sgl_jax.engine.generation import EngineFailed
from sgl_jax.engine.service import GenerationService
from sgl_jax.engine.transport import ProcessTransport
from sgl_jax.engine.watchdog import Watchdog
from sgl_jax.observability.log import READY, address_line
from sgl_jax.observability.request_tracer import RequestTracer
from sgl_jax.server.app import create_app
from sgl_jax.server.connection import Limits, http_config, most_connections
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.settings.serving_flags import MAX_QUEUED_REQUESTS
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

logger = logging.getLogger(__name__)

OK, FAILED = 0, 1  # exit codes
_LAST_WORDS_S = 3  # time for answers that are still being written at the end


def run(server_args: ServerArgs, transport: ProcessTransport, listener: socket.socket) -> int:
    """Serve an engine that was launched. Returns the exit code."""
    uvicorn_log = logging.getLogger("uvicorn.error")  # it would log "running" before the server is ready
    uvicorn_log.setLevel(max(logging.WARNING, uvicorn_log.getEffectiveLevel()))
    try:
        return uvloop.run(_Server(server_args, transport, listener).run())
    except (TokenizerError, TemplateError) as error:
        print(f"sgl_jax: error: {error}", file=sys.stderr)
        return FAILED


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # _Server handles signals


class _Server:
    def __init__(self, args: ServerArgs, transport: ProcessTransport, listener: socket.socket):
        self._args, self._transport, self._listener = args, transport, listener
        self._stop, self._stop_now = asyncio.Event(), asyncio.Event()
        self._url = ""
        self._signal = 0  # the last one; 0: none yet

    async def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        args = self._args
        tokenizer = await asyncio.to_thread(
            load_tokenizer, args.tokenizer_path or args.model_path, args.chat_template, args.downloads
        )
        hard_s = args.watchdog_timeout
        if args.nnodes > 1 and hard_s:
            hard_s += 5.0  # host 0's engine process, which can name the host that is behind, goes first
        watchdog = Watchdog(args.soft_watchdog_timeout, hard_s)
        max_queued = args.max_queued_requests or MAX_QUEUED_REQUESTS
        service = GenerationService(
            self._transport, tokenizer, args.stream_interval, max_queued, watchdog, args.lora_dir
        )
        limits = Limits(args.max_request_bytes, most_connections())
        tracer = RequestTracer(args.otlp_traces_endpoint) if args.otlp_traces_endpoint else None
        http = _Uvicorn(http_config(create_app(service, args, tracer), limits, _LAST_WORDS_S))
        listening = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        host, port = self._listener.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("Listening on %s; requests are taken when the engine is ready", self._url)
        try:
            return await self._serve(service)
        finally:
            await service.close(timeout=0.0 if self._stop_now.is_set() or not service.ready_once else 10.0)
            http.should_exit = True
            http.force_exit = self._stop_now.is_set()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
            if tracer is not None:
                tracer.close()

    async def _serve(self, service: GenerationService) -> int:
        failed = asyncio.ensure_future(service.failed.wait())
        stop, stop_now = asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(self._stop_now.wait())
        starting = asyncio.ensure_future(self._get_ready(service))
        try:
            await asyncio.wait((starting, stop, failed), return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.exception() is None and not stop.done():
                await asyncio.wait((stop, failed), return_when=asyncio.FIRST_COMPLETED)
            if service.failure is not None:
                print(f"sgl_jax: error: {service.failure}", file=sys.stderr)
                return FAILED
            if not starting.done():
                return 128 + self._signal  # told to stop before anything was served, which is no success
            starting.result()
            timeout_s = self._args.shutdown_timeout_s
            line = "Shutting down: %d requests have %.0f s to finish; a second signal stops at once."
            logger.info(line, service.num_live, timeout_s)
            draining = asyncio.ensure_future(service.drain(timeout_s))
            await asyncio.wait((draining, stop_now, failed), return_when=asyncio.FIRST_COMPLETED)
            finished = draining.done() and draining.result()
            if not finished:
                logger.warning("Stopped with %d requests unfinished.", service.num_live)
            draining.cancel()
            return OK if finished and service.failure is None and not stop_now.done() else FAILED
        finally:
            for task in (failed, stop, stop_now, starting):
                task.cancel()

    async def _get_ready(self, service: GenerationService) -> None:
        with contextlib.suppress(EngineFailed):  # service.failure has the reason
            await service.start()
            if not self._args.skip_server_warmup:
                logger.info("Warming up: the next prefill is the server's own")
                await service.probe(num_tokens=4)  # the first request takes longer than later ones
            service.open()
            print(READY, flush=True)
            logger.info("%s", address_line(self._url, pages=not self._args.no_ui))

    def _on_signal(self, number: int) -> None:
        self._signal = number
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()
