"""The engine's loop: commands in, one step, events out. It knows nothing of devices, processes or sockets."""

from __future__ import annotations

import logging
from typing import Protocol

from sgl_jax.engine.messages import Command, EngineDied, EngineInfo, Event, Ready, Shutdown

logger = logging.getLogger(__name__)


class EngineCore(Protocol):
    """A core that the loop drives. One thread calls it; nothing here blocks except `step`, for one iteration."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def busy(self) -> bool:
        """Whether `step` has work: requests to run, a step in flight, or events not yet handed out."""
        ...

    def handle(self, command: Command) -> None:
        """Takes a command in. What it produces at once (an abort's Finished) comes out of the next `step`."""
        ...

    def step(self) -> list[Event]:
        """One iteration: plan, dispatch, collect the step before. Also returns the events kept by `handle`."""
        ...

    def close(self, reason: str = "") -> None:
        """The last call: nothing comes after it. `reason`: why the engine failed; empty when it was told to leave."""
        ...


class Inbox(Protocol):
    def get(self, block: bool) -> Command | None:
        """The next command. Without `block`, None when there is none."""
        ...


class Outbox(Protocol):
    def send(self, event: Event) -> None: ...


def run(core: EngineCore, inbox: Inbox, outbox: Outbox) -> None:
    """Serves commands until Shutdown. Idle, it is blocked on the inbox; an error is sent as EngineDied and raised."""
    reason = ""
    try:
        outbox.send(Ready(core.info))
        while True:
            command = inbox.get(block=not core.busy)
            while command is not None:
                if isinstance(command, Shutdown):
                    return
                core.handle(command)
                command = inbox.get(block=False)
            for event in core.step():
                outbox.send(event)
    except Exception as error:
        logger.exception("the engine failed")
        reason = one_line(error)
        outbox.send(EngineDied(reason))
        raise
    finally:
        core.close(reason)


def one_line(error: BaseException) -> str:
    """The error as a user should read it: the first line of its message, with its type where that says more."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
