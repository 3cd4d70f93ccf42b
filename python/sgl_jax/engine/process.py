"""The engine process: started by the API process, it builds the engine core, runs its loop, and ends with its parent.

The parent writes one JSON line to the child's standard input and keeps the pipe open; when the pipe closes, the parent
is gone. Signals are the parent's to decide on: SIGINT and SIGTERM, which a terminal or a container sends to both, are
ignored here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CORE_FACTORY = "sgl_jax.engine.startup:launch"
FAILED = 1  # exit code
LINGER_MS = 2000  # the last words of an engine that dies still get out


def spawn(server_args: DataclassInstance, core_factory: str, commands: str, events: str) -> subprocess.Popen[bytes]:
    """`core_factory` is "module:function", called in the child with `server_args` and `die`: a function that ends the
    child at once and sends its argument as the reason, whatever the other threads are at."""
    kind = type(server_args)
    config = {
        "args_type": f"{kind.__module__}:{kind.__qualname__}",
        "args": {field.name: getattr(server_args, field.name) for field in dataclasses.fields(server_args)},
        "core_factory": core_factory,
        "commands": commands,
        "events": events,
    }
    process = subprocess.Popen([sys.executable, "-m", "sgl_jax.engine.process"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    return process


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    config = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, name="sgl-jax-parent", daemon=True).start()

    import zmq

    from sgl_jax.engine.loop import one_line, run
    from sgl_jax.engine.messages import EngineDied
    from sgl_jax.engine.sockets import ZmqInbox, ZmqOutbox
    from sgl_jax.observability import log

    context: zmq.Context[Any] = zmq.Context()
    inbox, outbox = ZmqInbox(context, config["commands"]), ZmqOutbox(context, config["events"])
    try:
        server_args = _named(config["args_type"])(**config["args"])
        log.setup(server_args.log_level)
        core = _named(config["core_factory"])(server_args, functools.partial(_die, config["events"]))
    except Exception as error:
        if not isinstance(error, ValueError | OSError):  # those are for the user to mend; anything else is ours
            import logging

            logging.getLogger(__name__).exception("the engine could not start")
        outbox.send(EngineDied(one_line(error)))
        context.destroy(linger=LINGER_MS)
        return FAILED
    try:
        run(core, inbox, outbox)
    except Exception:  # logged and sent by the loop
        return FAILED
    finally:
        context.destroy(linger=LINGER_MS)
    return 0


def _die(events: str, reason: str) -> NoReturn:
    import zmq

    from sgl_jax.engine.messages import EngineDied
    from sgl_jax.engine.sockets import ZmqOutbox

    context: zmq.Context[Any] = zmq.Context()  # its own: sockets belong to threads
    ZmqOutbox(context, events).send(EngineDied(reason))
    context.destroy(linger=LINGER_MS)
    os._exit(FAILED)


def _end_with_parent() -> None:
    # Not through the buffered sys.stdin: its lock, held by a blocked read, would be fatal when the interpreter ends.
    while os.read(0, 1024):
        pass
    os._exit(FAILED)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    # The loop's own threads may be inside a device runtime; leaving without waiting for them is intended.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
