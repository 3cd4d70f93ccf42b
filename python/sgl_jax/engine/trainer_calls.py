"""Calls of a trainer, on the engine's side: generation pauses and goes on, weights are exchanged, memory is lent.

Each is carried out at rest, when no step is in flight, in the order of their coming; until then no step is planned. Weights are
read before that, beside the requests.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Protocol

from sgl_jax.engine.messages import (
    ContinueGeneration,
    Event,
    Finished,
    PauseGeneration,
    Refused,
    ReleaseMemory,
    ResumeMemory,
    StateChanged,
    UpdateWeights,
)
from sgl_jax.request import FinishReason
from sgl_jax.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

type TrainerCall = PauseGeneration | ContinueGeneration | UpdateWeights | ReleaseMemory | ResumeMemory


class DeviceArrays(Protocol):
    """Weights and KV pools on the devices, as the engine needs them (runtime.held_arrays)."""

    @property
    def released(self) -> frozenset[str]: ...

    def read(self, path: str, load_format: str) -> Future[None]:
        """Begin to read weights into the host's memory. The result has the error of those that do not fit."""
        ...

    def exchange(self) -> None:
        """Use the weights that were read."""

    def release(self, tags: Iterable[str]) -> None: ...

    def resume(self, tags: Iterable[str]) -> None: ...


class TrainerCalls:
    def __init__(self, arrays: DeviceArrays | None = None, refusal: str = "this engine cannot exchange its arrays"):
        """`refusal`: why there are no `arrays`."""
        self._arrays, self._refusal = arrays, refusal
        self._paused = False
        self._calls: list[TrainerCall] = []  # to be carried out at rest
        self._reading: tuple[UpdateWeights, Future[None]] | None = None
        self._answers: list[Event] = []
        self.holds = False  # no step may be planned
        self.has_work = False

    def handle(self, call: TrainerCall) -> None:
        """Take in a call. It is answered by `poll`."""
        if isinstance(call, PauseGeneration | ContinueGeneration):
            self._calls.append(call)
        elif self._arrays is None:
            self._answers.append(Refused(call.call, self._refusal))
        elif not isinstance(call, UpdateWeights):
            self._calls.append(call)
        elif self._reading is not None or any(isinstance(each, UpdateWeights) for each in self._calls):
            self._answers.append(Refused(call.call, "other weights are being read; wait until that has ended"))
        else:
            self._reading = call, self._arrays.read(call.path, call.load_format)
        self._note()

    def poll(self, scheduler: Scheduler, *, at_rest: bool) -> tuple[list[Event], list[Finished]]:
        """Carry out what can be by now. Return the answers, and the requests that were aborted."""
        self._poll_read()
        finished: list[Finished] = []
        if at_rest:
            while self._calls:
                call, answer = self._calls.pop(0), ""
                if self._aborts(call):
                    reason = FinishReason("abort")
                    finished += [Finished(key, reason) for key in [*scheduler.requests] if scheduler.abort(key)]
                if (error := self._refuses(call, scheduler)) is None:
                    answer = self._carry_out(call, scheduler)
                self._answers.append(self._answer(call, answer, scheduler) if error is None else error)
        events, self._answers = self._answers, []
        self._note()
        return events, finished

    def _note(self) -> None:
        """Note what every step asks, after a change."""
        self.holds = bool(self._calls) or self._holds_on
        self.has_work = bool(self._calls or self._answers) or self._reading is not None

    @property
    def _holds_on(self) -> bool:
        """Whether no step may be planned until another call."""
        return self._paused or (self._arrays is not None and bool(self._arrays.released))

    def _poll_read(self) -> None:
        if self._reading is None or not self._reading[1].done():
            return
        (call, read), self._reading = self._reading, None
        try:
            read.result()
        except (ValueError, OSError) as error:
            self._answers.append(Refused(call.call, f"model_path is {call.path}: {error}", "model_path"))
        except Exception as error:  # a file that nobody thought of ends no engine
            logger.exception("Reading weights failed")
            text = f"model_path is {call.path}; it cannot be read: {type(error).__name__}: {error}"
            self._answers.append(Refused(call.call, text, "model_path"))
        else:
            self._calls.append(call)

    def _aborts(self, call: TrainerCall) -> bool:
        return call.abort_all if isinstance(call, UpdateWeights) else getattr(call, "mode", "") == "abort"

    def _refuses(self, call: TrainerCall, scheduler: Scheduler) -> Refused | None:
        if not isinstance(call, ReleaseMemory) or not scheduler.has_requests:
            return None
        if self._paused and not scheduler.num_running:
            return None
        cure = "wait for them, or pause generation with mode abort or retract"
        return Refused(call.call, f"{len(scheduler.requests)} requests are live; {cure}")

    def _carry_out(self, call: TrainerCall, scheduler: Scheduler) -> str:
        """Do what the call asks for, and say that it is done."""
        arrays = self._arrays
        if isinstance(call, PauseGeneration):
            self._paused = True
            if call.mode == "retract":
                scheduler.preempt_all()
            return "Generation is paused."
        if isinstance(call, ContinueGeneration):
            self._paused = False
            return "Generation goes on." + (" It waits for released memory." if self._holds_on else "")
        assert arrays is not None
        if isinstance(call, UpdateWeights):
            scheduler.preempt_all()  # their KV is computed anew
            arrays.exchange()
            scheduler.flush()
            logger.info("The weights are those of %s", call.path)
            return f"The weights are those of {call.path}."
        if isinstance(call, ReleaseMemory):
            if "kv_cache" in call.tags:
                scheduler.flush()
            arrays.release(call.tags)
        else:
            arrays.resume(call.tags)
        left = ", ".join(sorted(arrays.released)) or "nothing"
        logger.info("Released of the devices' memory: %s", left)
        return f"Released: {left}."

    def _answer(self, call: TrainerCall, message: str, scheduler: Scheduler) -> StateChanged:
        holds = self._holds_on
        weights = (call.path, call.version) if isinstance(call, UpdateWeights) else None
        return StateChanged(call.call, message, len(scheduler.requests) if holds else 0, holds, weights)
