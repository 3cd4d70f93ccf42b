"""Profiles, one at a time: started and stopped by command, or ended after a given number of steps.

The tracer (runtime/tracing.py) decides what is recorded and how; this module only knows steps and states.
"""

import logging
import time
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec.structs import replace

from sgl_jax.engine.messages import GetProfile, ProfileAnswer, ProfileStatus, Refused, StartProfile, StopProfile

logger = logging.getLogger(__name__)


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

    @property
    def status(self) -> ProfileStatus:
        if not self._status.running:
            return self._status
        return replace(self._status, steps_done=max(0, self._num_collected - self._first))

    def handle(self, command: StartProfile | StopProfile | GetProfile) -> ProfileAnswer | Refused:
        match command:
            case StartProfile():
                return self._start(command)
            case StopProfile(call=call):
                return self._stop(call)
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
        status = self._status
        if status.running and status.num_steps == self._num_collected - self._first:
            self.close()

    def close(self) -> None:
        """End the profile that runs, if one does, and write it."""
        status = self.status
        if not status.running:
            return
        started = time.perf_counter()
        try:
            files = self._tracer.stop()
        except (OSError, RuntimeError, ValueError) as error:
            message = f"the profile could not be written to {status.output_dir}: {error}"
            logger.error("%s", message)
            self._status = replace(status, running=False, error=message)
            return
        self._status = replace(status, running=False, files=files)
        seconds = time.perf_counter() - started
        logger.info("Profile of %d steps written to %s in %.2f s", status.steps_done, status.output_dir, seconds)

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

    def _stop(self, call: int) -> ProfileAnswer | Refused:
        if not self._status.running:
            last = f"; the last one {self._said()}" if self._status.started_at else ""
            return Refused(call, f"no profile is running{last}")
        self.close()
        return Refused(call, self._status.error) if self._status.error else ProfileAnswer(call, self._status)

    def _said(self) -> str:
        """Describe the profile in a refusal of another, or of stopping it."""
        status = self.status
        verb = "is running since" if status.running else "was started at"
        since = time.strftime("%H:%M:%S", time.localtime(status.started_at))
        return f"{verb} {since} and has {status.steps_done} steps in {status.output_dir}"
