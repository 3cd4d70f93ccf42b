"""Engine process: started by the API process, it builds the engine core, runs its loop, and ends with its parent.

The parent writes one JSON line to the child's standard input and keeps the pipe open; when the pipe closes, the parent
is gone. A terminal or a container sends SIGINT and SIGTERM to both processes: the parent acts on them, and they are
ignored here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from sgl_jax.settings.server_args import ServerArgs, environment

if TYPE_CHECKING:
    import zmq

    from sgl_jax.engine.loop import EngineCore, Receive, Send

CORE_FACTORY = "sgl_jax.engine.startup:launch"
FAILED = 1  # exit code
# Large arrays lie in huge pages. So the pages of KV on a CPU, which are read in any order, are found faster.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
LINGER_MS = 2000  # time for the last messages of an engine that dies to get out


def spawn(server_args: ServerArgs, core_factory: str, commands: str, events: str) -> subprocess.Popen[bytes]:
    """Start the engine process. `core_factory` is "module:function", called there with `server_args`, `die` and
    `tell`; `commands` and `events` are sockets in a folder of their own.

    `die` ends the process at once, from any thread, and sends its argument as the reason. `tell` sends the progress of
    the start, from the thread that makes the core.
    """
    sockets = {"commands": commands, "events": events}
    config = {"args": dataclasses.asdict(server_args), "core_factory": core_factory, **sockets}
    command, variables = [sys.executable, "-m", "sgl_jax.engine.process"], with_huge_pages(environment())
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables)
    assert process.stdin is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    return process


def with_huge_pages(variables: dict[str, str]) -> dict[str, str]:
    """Return the environment with huge pages switched on, unless it says otherwise: of two settings the last counts."""
    chosen = variables.get("GLIBC_TUNABLES")
    return variables | {"GLIBC_TUNABLES": f"{HUGE_PAGES}:{chosen}" if chosen else HUGE_PAGES}


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config = json.loads(sys.stdin.buffer.readline())
    folder = os.path.dirname(config["commands"].removeprefix("ipc://"))
    threading.Thread(target=_end_with_parent, args=(folder,), name="sgl-jax-parent", daemon=True).start()

    import zmq

    from sgl_jax.engine.loop import build_and_run
    from sgl_jax.observability import log

    context: zmq.Context[Any] = zmq.Context()
    receive, send = _receiver(context, config["commands"]), _sender(context, config["events"])

    def build() -> EngineCore:
        server_args = ServerArgs(**config["args"])
        log.setup(server_args.log_level)
        module, _, name = config["core_factory"].partition(":")
        factory = getattr(importlib.import_module(module), name)
        return factory(server_args, functools.partial(_die, config["events"]), send)

    ended_well = build_and_run(build, receive, send)
    context.destroy(linger=LINGER_MS)
    return 0 if ended_well else FAILED


def _receiver(context: zmq.Context[Any], address: str) -> Receive:
    """Bind a socket for commands."""
    import msgspec
    import zmq

    from sgl_jax.engine.messages import Command

    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)
    socket.bind(address)
    decode = msgspec.msgpack.Decoder(Command).decode

    def receive(block: bool) -> Command | None:
        try:
            return decode(socket.recv(0 if block else zmq.NOBLOCK))
        except zmq.Again:
            return None

    return receive


def _sender(context: zmq.Context[Any], address: str) -> Send:
    """Connect a socket for events."""
    import msgspec
    import zmq

    socket = context.socket(zmq.PUSH)
    socket.set_hwm(0)
    socket.connect(address)
    encode = msgspec.msgpack.Encoder().encode
    return lambda event: socket.send(encode(event))


def _die(events: str, reason: str) -> NoReturn:
    import zmq

    from sgl_jax.engine.messages import EngineDied

    context: zmq.Context[Any] = zmq.Context()  # a context of its own, because a socket belongs to one thread
    _sender(context, events)(EngineDied(reason))
    context.destroy(linger=LINGER_MS)
    os._exit(FAILED)


def _end_with_parent(folder: str) -> None:
    """Wait for the parent's end; when it was killed, the folder of the sockets is still there."""
    # A blocked read of the buffered sys.stdin would hold its lock, which is fatal when the interpreter ends.
    while os.read(0, 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(FAILED)


if __name__ == "__main__":
    # Threads may be inside a device runtime; the process ends without waiting for them.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
