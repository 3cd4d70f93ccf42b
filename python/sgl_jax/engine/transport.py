"""How messages get from the API side to the engine and back: a thread of this process, or a process over ZMQ.

The API side is one asyncio loop. A transport calls `on_event` in that loop, in the order the engine sent the events,
and reports an engine that ends without a word as EngineDied.
"""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import zmq

from sgl_jax.engine.loop import EngineCore, one_line, run
from sgl_jax.engine.messages import Command, EngineDied, Event, Shutdown
from sgl_jax.engine.process import spawn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RECONNECT_MS = 10
_LAST_WORDS_S = 0.5
_MAX_IPC_PATH = 100  # the kernel's limit for a socket's path is 107 bytes

type OnEvent = Callable[[Event], None]


class Transport(Protocol):
    """The API side's end."""

    def start(self, on_event: OnEvent) -> None:
        """Starts the engine. Called once, in the running loop that is to receive the events."""
        ...

    def send(self, command: Command) -> None: ...

    async def close(self, timeout: float) -> None:
        """Sends Shutdown and waits for the engine to leave, at most `timeout` seconds."""
        ...


# --- a thread ---------------------------------------------------------------------------------------------------------


class _QueueInbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.put = self._queue.put

    def get(self, block: bool) -> Command | None:
        try:
            return self._queue.get(block)
        except queue.Empty:
            return None


class _LoopOutbox:
    def __init__(self, loop: asyncio.AbstractEventLoop, on_event: OnEvent):
        self._loop, self._on_event = loop, on_event

    def send(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)


class ThreadTransport:
    """The engine in a thread of this process."""

    def __init__(self, build_core: Callable[[], EngineCore]):
        self._build_core = build_core
        self._inbox = _QueueInbox()
        self._thread: threading.Thread | None = None

    def start(self, on_event: OnEvent) -> None:
        outbox = _LoopOutbox(asyncio.get_running_loop(), on_event)
        self._thread = threading.Thread(target=self._main, args=(outbox,), name="sgl-jax-engine", daemon=True)
        self._thread.start()

    def _main(self, outbox: _LoopOutbox) -> None:
        try:
            core = self._build_core()
        except Exception as error:
            outbox.send(EngineDied(one_line(error)))
            return
        try:
            run(core, self._inbox, outbox)
        except Exception:
            return  # already logged and sent as EngineDied

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    async def close(self, timeout: float) -> None:
        self._inbox.put(Shutdown())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout)


# --- a process --------------------------------------------------------------------------------------------------------


class ProcessTransport:
    """The engine in a child process of ours, started by `launch`; sockets in a private folder."""

    def __init__(self, server_args: DataclassInstance, core_factory: str):
        self._server_args, self._core_factory = server_args, core_factory
        self._folder = ""
        self._context: zmq.Context[Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Starts the process; it loads while the caller goes on. `start` does it too, if this was not called."""
        self._folder = _private_folder()
        commands, events = f"ipc://{self._folder}/commands", f"ipc://{self._folder}/events"
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.PULL)
        for socket in (self._commands, self._events):
            socket.set_hwm(0)
            socket.linger = 0
        # Both senders connect and both receivers bind: a connected sender queues what it sends before, and after, its
        # peer is there, where a bound one would block.
        self._commands.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._commands.connect(commands)
        self._events.bind(events)
        self._process = spawn(self._server_args, self._core_factory, commands, events)

    def start(self, on_event: OnEvent) -> None:
        if self._process is None:
            self.launch()
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._events.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._receive)
        self._loop.call_soon(self._receive)  # what came before the reader was there does not wake it
        threading.Thread(target=self._wait, name="sgl-jax-engine-exit", daemon=True).start()

    def _receive(self) -> None:
        # ZMQ's descriptor tells of changes only: read until nothing is left.
        while not self._events.closed:
            try:
                data = self._events.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_event(self._decode(data))

    def _wait(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._exited.set()
        if not self._closing and self._loop is not None and not self._loop.is_closed():
            # What it said last may still be on its way through the socket, and explains more than an exit code.
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_S, self._on_exit, code)

    def _on_exit(self, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._on_event(EngineDied(f"the engine process {how}"))

    def send(self, command: Command) -> None:
        self._commands.send(self._encode(command), zmq.NOBLOCK)

    async def close(self, timeout: float) -> None:
        self._closing = True
        if self._context is None:
            return
        if timeout > 0 and self._loop is not None and not self._exited.is_set():
            self.send(Shutdown())
            await asyncio.to_thread(self._exited.wait, timeout)
        if self._loop is not None and self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._fd = -1
        self.kill()

    def kill(self) -> None:
        """Ends the process if it still runs, and removes the sockets. For every way out; may be called twice."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None
            shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="sgl-jax-")  # mode 0700
    if len(os.fsencode(folder)) + len("/commands") > _MAX_IPC_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="sgl-jax-", dir=Path("/tmp") if sys.platform != "win32" else None)
    return folder
