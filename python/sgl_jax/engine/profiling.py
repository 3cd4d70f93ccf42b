"""Profiles, one at a time: started and stopped by command, or ended after a number of steps or at a limit.

The tracer (runtime/tracing.py) decides what is recorded and how; this module only knows steps and states. A recording
is written in a thread of its own, while the engine goes on.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec.structs import replace

from sgl_jax.engine.messages import GetProfile, ProfileAnswer, ProfileStatus, Refused, StartProfile, StopProfile

logger = logging.getLogger(__name__)

MOST_STEPS = 200
MOST_SECONDS = 300.0
MOST_BYTES = 512 << 20  # growth of the process while it records; writing takes some times as much


class Tracer(Protocol):
    """Profiler of the device runtime. `step` and `stage` cost next to nothing while nothing is recorded."""

    def step(self, number: int) -> AbstractContextManager[object]:
        """Mark the block as one step of the engine."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Mark the block as a named part of the step."""

    def start(self, folder: str | None, host_level: int | None, python_level: int | None) -> str:
        """Record from now on, and return the folder, which is a new one if None was given. The levels are those of jax's
        profiler options: how much it traces of the host and of Python.

        Raises OSError or ValueError if it cannot be written, RuntimeError if another recording runs in the process.
        """

    def num_bytes(self) -> int:
        """Return the bytes by which the process has grown since `start`."""

    def stop(self) -> list[str]:
        """Write the recording and return its files. Raises OSError, RuntimeError or ValueError."""


class Profiler:
    def __init__(self, tracer: Tracer, default_folder: str | None = None):
        self.stage = tracer.stage
        self._tracer = tracer
        self._default_folder = default_folder
        self._status = ProfileStatus()
        self._num_launched = self._num_collected = 0
        self._first = 0  # number of the first step that is completely in the profile
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-profile")
        self._written: Future[list[str]] | None = None  # a recording that has ended
        self._stops: list[int] = []  # calls that wait for it

    @property
    def writing(self) -> bool:
        """Whether `poll` must be called until a profile is written. While one is recorded, once a step is enough."""
        return self._written is not None

    @property
    def status(self) -> ProfileStatus:
        if not self._status.running or self.writing:
            return self._status
        return replace(self._status, steps_done=max(0, self._num_collected - self._first))

    def handle(self, command: StartProfile | StopProfile | GetProfile) -> ProfileAnswer | Refused | None:
        """Carry out a command and return its answer; None: `poll` returns it when the profile has been written."""
        match command:
            case StartProfile():
                return self._start(command)
            case StopProfile(call=call):
                if not self._status.running:
                    last = f"; the last one {self._said()}" if self._status.started_at else ""
                    return Refused(call, f"no profile is running{last}")
                self._stops.append(call)
                self._end("it was stopped")
                return None
            case GetProfile(call=call):
                return ProfileAnswer(call, self.status)

    def step(self) -> AbstractContextManager[object]:
        """Mark the block as the next step of the engine."""
        return self._tracer.step(self._num_launched)

    def launched(self) -> None:
        self._num_launched += 1

    def collected(self) -> None:
        """Count the oldest launched step as complete, and end a profile that has its number of steps now."""
        self._num_collected += 1
        if self.status.running and self.status.steps_done == (self._status.num_steps or MOST_STEPS):
            self._end(f"it has {self.status.steps_done} steps")

    def poll(self) -> list[ProfileAnswer | Refused]:
        """End a profile at its limits. Return the answers to stops of one that has been written."""
        if self._written is not None:
            return self._take(self._written) if self._written.done() else []
        if not self._status.running:
            return []
        if time.time() - self._status.started_at > MOST_SECONDS:
            self._end(f"it has run for {MOST_SECONDS:.0f} s, the limit")
        elif self._tracer.num_bytes() > MOST_BYTES:
            self._end(f"it takes more than {MOST_BYTES >> 20} MiB, the limit")
        return []

    def close(self) -> None:
        """End the profile that runs, if one does, and wait until it is written."""
        if self._status.running:
            self._take(self._end("the engine ends"))

    def _end(self, reason: str) -> Future[list[str]]:
        """Stop recording and begin to write, unless that has begun."""
        if self._written is None:
            self._status = replace(self.status, ended=reason)
            logger.info("The profile has ended: %s", reason)
            self._written = self._writer.submit(self._tracer.stop)
        return self._written

    def _take(self, written: Future[list[str]]) -> list[ProfileAnswer | Refused]:
        """Wait for the files, and return the answers to the stops."""
        stops, self._stops, self._written = self._stops, [], None
        status = replace(self._status, running=False)
        try:
            self._status = status = replace(status, files=written.result())
            logger.info("Profile of %d steps written to %s", status.steps_done, status.output_dir)
            return [ProfileAnswer(call, status) for call in stops]
        except (OSError, RuntimeError, ValueError) as error:
            message = f"the profile could not be written to {status.output_dir}: {error}"
            logger.error("%s", message)
            self._status = replace(status, error=message)
            return [Refused(call, message) for call in stops]

    def _start(self, command: StartProfile) -> ProfileAnswer | Refused:
        if self._status.running:
            return Refused(command.call, f"a profile {self._said()}; stop it first")
        folder = command.output_dir or self._default_folder
        try:
            folder = self._tracer.start(folder, command.host_tracer_level, command.python_tracer_level)
        except (OSError, ValueError) as error:
            name = "output_dir is" if command.output_dir else "no output_dir is given, and --profiler-dir is"
            reason = getattr(error, "strerror", None) or error
            return Refused(command.call, f"{name} {folder}, where nothing can be written: {reason}", "output_dir")
        except RuntimeError as error:
            return Refused(command.call, f"the profile could not be started: {error}")
        self._first = self._num_launched
        self._status = ProfileStatus(True, folder, started_at=time.time(), num_steps=command.num_steps)
        logger.info("Profiling to %s", folder)
        return ProfileAnswer(command.call, self.status)

    def _said(self) -> str:
        """Describe the profile in a refusal of another, or of stopping it."""
        status = self.status
        verb = "is running since" if status.running else "was started at"
        since = time.strftime("%H:%M:%S", time.localtime(status.started_at))
        return f"{verb} {since} and has {status.steps_done} steps in {status.output_dir}"
