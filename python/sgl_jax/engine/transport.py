"""Transports of messages between the API side and the engine, which is a thread of this process or a child process.

The API side is one asyncio loop. A transport calls `on_event` in that loop, in the order the engine sent the events,
and reports an engine that ends without a message as EngineDied.
"""

import asyncio
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from sgl_jax.engine.loop import EngineCore, build_and_run
from sgl_jax.engine.messages import Command, EngineDied, Event, Shutdown
from sgl_jax.engine.process import spawn
from sgl_jax.settings.server_args import ServerArgs

_RECONNECT_MS = 10
_LAST_WORDS_S = 0.5
_MAX_IPC_PATH = 100  # the kernel's limit for a socket's path is 107 bytes

type OnEvent = Callable[[Event], None]


class ThreadTransport:
    """Runs the engine in a thread of this process."""

    def __init__(self, build_core: Callable[[], EngineCore]):
        self._build_core = build_core
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_event: OnEvent) -> None:
        """Start the engine. Called once, in the running loop that is to receive the events."""
        loop = asyncio.get_running_loop()

        def report(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_event, event)

        work = self._build_core, self._receive, report
        self._thread = threading.Thread(target=build_and_run, args=work, name="sgl-jax-engine", daemon=True)
        self._thread.start()

    def _receive(self, block: bool) -> Command | None:
        try:
            return self._commands.get(block)
        except queue.Empty:
            return None

    def send(self, command: Command) -> None:
        self._commands.put(command)

    async def close(self, timeout: float) -> None:
        """Send Shutdown and wait for the engine to leave, at most `timeout` seconds."""
        self.send(Shutdown())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout)


class ProcessTransport:
    """Runs the engine in a child process; the sockets are in a private folder."""

    def __init__(self, server_args: ServerArgs, core_factory: str):
        """Start the process, which loads while the caller goes on."""
        self._folder = _private_folder()
        commands, events = f"ipc://{self._folder}/commands", f"ipc://{self._folder}/events"
        self._context: zmq.Context[Any] = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        for socket in (self._commands, self._events):
            socket.set_hwm(0)
            socket.linger = 0
        # Both senders connect and both receivers bind: a connected sender queues messages while its peer is not there,
        # where a bound one would block.
        self._commands.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._commands.connect(commands)
        self._events.bind(events)
        self._fd = int(self._events.getsockopt(zmq.FD))
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode
        self._exited = threading.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop to call `on_event` in, from `start` on
        try:
            self._process = spawn(server_args, core_factory, commands, events)
        except BaseException:
            self._context.destroy(linger=0)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def start(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._receive)
        self._loop.call_soon(self._receive)  # events that came before the reader was added do not wake it
        threading.Thread(target=self._wait, name="sgl-jax-engine-exit", daemon=True).start()

    def _receive(self) -> None:
        # ZMQ's descriptor signals changes only, so everything that is there must be read.
        while not self._events.closed:
            try:
                data = self._events.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_event(self._decode(data))

    def _wait(self) -> None:
        code = self._process.wait()
        self._exited.set()
        if not self._closing and self._loop is not None and not self._loop.is_closed():
            # Its last message may still be on its way through the socket, and explains more than an exit code.
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_S, self._on_exit, code)

    def _on_exit(self, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._on_event(EngineDied(f"the engine process {how}"))

    def send(self, command: Command) -> None:
        self._commands.send(self._encode(command), zmq.NOBLOCK)

    async def close(self, timeout: float) -> None:
        self._closing = True
        if timeout > 0 and self._loop is not None and not self._exited.is_set():
            self.send(Shutdown())
            await asyncio.to_thread(self._exited.wait, timeout)
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None
        self.kill()

    def kill(self) -> None:
        """End the process if it still runs, and remove the sockets. May be called twice."""
        self._closing = True
        self._process.kill()
        self._process.wait()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


type Transport = ThreadTransport | ProcessTransport


class NoSockets(RuntimeError):
    """Failure to make a folder for the sockets."""


def _private_folder() -> str:
    try:
        folder = tempfile.mkdtemp(prefix="sgl-jax-")  # mode 0700
    except OSError as error:
        text = f"the sockets to the engine need a folder: {error.strerror or error}; name one that can be written in TMPDIR"
        raise NoSockets(text) from None
    if len(os.fsencode(folder)) + len("/commands") > _MAX_IPC_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="sgl-jax-", dir="/tmp")
    return folder
