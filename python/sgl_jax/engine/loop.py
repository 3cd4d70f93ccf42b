"""Engine loop: commands in, one step, events out. It knows nothing of devices, processes or sockets."""

import logging
from collections.abc import Callable
from typing import Protocol

from sgl_jax.engine.messages import Command, EngineDied, EngineInfo, Event, Ready, Shutdown

logger = logging.getLogger(__name__)

# `receive(block)` returns the next command; without `block` None if there is none.
type Receive = Callable[[bool], Command | None]
type Send = Callable[[Event], None]


class EngineCore(Protocol):
    """A core that the loop drives. One thread calls it; nothing here blocks except `step`, for one iteration."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def busy(self) -> bool:
        """Whether `step` has work: requests to run, a step in flight, or events not yet handed out."""

    def handle(self, command: Command) -> None:
        """Take a command in. Events that it produces at once (an abort's Finished) come out of the next `step`."""

    def step(self) -> list[Event]:
        """Plan and dispatch a step and collect the one before. Returns its events and those kept by `handle`."""

    def close(self, reason: str = "") -> None:
        """End the core; nothing is called after it. `reason`: why the engine failed; empty: it was told to leave."""


def run(core: EngineCore, receive: Receive, send: Send) -> None:
    """Serve commands until Shutdown, blocked in `receive` while idle. An error is sent as EngineDied and raised."""
    reason = ""
    try:
        send(Ready(core.info))
        while True:
            command = receive(not core.busy)
            while command is not None:
                if isinstance(command, Shutdown):
                    return
                core.handle(command)
                command = receive(False)
            for event in core.step():
                send(event)
    except Exception as error:
        logger.exception("the engine failed")
        reason = one_line(error)
        send(EngineDied(reason))
        raise
    finally:
        core.close(reason)


def build_and_run(build: Callable[[], EngineCore], receive: Receive, send: Send) -> bool:
    """Run a core from its making to Shutdown. False: it failed, which has been sent as EngineDied."""
    try:
        core = build()
    except Exception as error:
        if not isinstance(error, ValueError | OSError):  # for these two the message is enough
            logger.exception("the engine could not start")
        send(EngineDied(one_line(error)))
        return False
    try:
        run(core, receive, send)
    except Exception:  # logged and sent by `run`
        return False
    return True


def one_line(error: BaseException) -> str:
    """Return the first line of the error's message, for the user, with the type of the error where that says more."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
