"""The engine's heart: commands in, one step after another, events out.

A step's plan is dispatched before the previous step's tokens have been read: overlap is data, the launched step that one
`step` call leaves and the next collects. Without overlap the same call collects what it launched; tokens are the same.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, Protocol

import numpy as np

from sgl_jax.engine.messages import (
    Abort,
    CacheFlushed,
    Command,
    EngineInfo,
    Event,
    Finished,
    FlushCache,
    Generate,
    GetProfile,
    LimitsMeasured,
    MachineLimits,
    MeasureLimits,
    PromptScored,
    Refused,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    TokenLogprobs,
)
from sgl_jax.engine.profiling import Profiler, Tracer
from sgl_jax.observability.log import decode_line, prefill_line
from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.scheduler import Scheduler, StepResult
from sgl_jax.step_plan import Flag, Param, StepPlan

logger = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.25


class Runner(Protocol):
    """What the core needs of the device side (runtime.runner, or testing.fake_runner)."""

    @property
    def compiles_after_ready(self) -> int: ...

    @property
    def tracer(self) -> Tracer: ...

    def launch(self, plan: StepPlan) -> Any: ...

    def collect(self, flight: Any) -> Any: ...

    def measure_limits(self) -> Any:
        """What the devices can do: an object with `read_bytes_per_s` and `matmul_flop_per_s`.

        Raises ValueError, with a line for the user, where that cannot be measured.
        """
        ...


class Core:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        *,
        overlap: bool = True,
        random_seed: int | None = None,
        decode_log_interval: int = 40,
        profiler_dir: str | None = None,
    ):
        self.info = info
        self.scheduler = scheduler
        self._runner = runner
        self._overlap = overlap
        self._profiler = Profiler(runner.tracer, profiler_dir)
        self._in_flight: Any = None
        self._seeds = np.random.default_rng(random_seed)
        self._num_arrived = 0
        self._events: list[Event] = []  # answers to commands, sent with the next step's
        self._speed = _Speedometer(decode_log_interval)
        self._stats_due = 0.0

    @property
    def runner(self) -> Runner:
        """The device side, for a tool that drives it by itself while there are no requests."""
        return self._runner

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do; if not, the loop may sleep until a command comes."""
        return self.scheduler.has_requests or self._in_flight is not None or bool(self._events)

    def handle(self, command: Command) -> None:
        """Take in a command. Its answer, if it has one, comes out of the next `step`."""
        match command:
            case Generate():
                self.scheduler.add(self._request(command))
            case Abort(keys=keys):
                reason = FinishReason("abort")
                ended = [Finished(key, reason) for key in keys if self.scheduler.abort(key)]
                if ended:
                    self._events.append(StepOutput(finished=ended))
            case FlushCache(call=call):
                self._events.append(CacheFlushed(call, self.scheduler.flush()))
            case MeasureLimits(call=call):
                self._events.append(self._measure_limits(call))
            case StartProfile() | StopProfile() | GetProfile():
                self._events.append(self._profiler.handle(command))

    def step(self) -> list[Event]:
        """Plan and launch a step, then collect the one before it (or itself, without overlap)."""
        events, self._events = self._events, []
        with self._profiler.step():
            launched = self._launch()
            if self._overlap:
                launched, self._in_flight = self._in_flight, launched
            if launched is not None:
                events.append(self._collect(launched))
        if launched is not None:
            self._profiler.collected()
        if not self.busy:
            self._speed.pause()
            self.scheduler.check_invariants()
        now = time.monotonic()
        if now >= self._stats_due or not self.busy:
            self._stats_due = now + _STATS_INTERVAL_S
            events.append(StepOutput(stats=self._stats()))
        return events

    def close(self, reason: str = "") -> None:
        """Nothing comes after this; a profile that still runs is written."""
        self._profiler.close()

    def _launch(self) -> Any:
        """Plan a step and start it; None if there is nothing to do."""
        with self._profiler.stage("plan"):
            plan = self.scheduler.schedule()
        if plan is None:
            return None
        with self._profiler.stage("dispatch"):
            launched = self._runner.launch(plan)
        self._profiler.launched()
        self._log(plan)
        return launched

    def _measure_limits(self, call: int) -> LimitsMeasured | Refused:
        s = self.scheduler
        if s.has_requests:
            return Refused(
                call,
                f"{s.num_running} requests run and {len(s.waiting)} wait, and would be measured along; "
                "ask again when there are none",
            )
        logger.info("Measuring the limits of %s; requests that come meanwhile wait", self.info.device_kind)
        try:
            found = self._runner.measure_limits()
        except ValueError as error:
            return Refused(call, str(error))
        return LimitsMeasured(
            call,
            MachineLimits(
                memory_gb_per_s=found.read_bytes_per_s / 1e9,
                matmul_tflop_per_s=found.matmul_flop_per_s / 1e12,
                dtype=self.info.dtype,
                device_kind=self.info.device_kind,
                num_devices=self.info.num_devices,
            ),
        )

    def _request(self, command: Generate) -> Request:
        params = command.params
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        eos = () if params.ignore_eos else self.info.eos_token_ids
        room = self.info.context_length - len(command.prompt_ids)
        self._num_arrived += 1
        return Request(
            key=command.key,
            prompt=np.array(command.prompt_ids, np.int32),
            params=params,
            namespace=command.namespace,
            seed=_fold(seed),
            max_total_tokens=len(command.prompt_ids) + min(params.max_tokens or room, room),
            stop_token_ids=np.array(sorted({*eos, *params.stop_token_ids}), np.int32),
            arrival=self._num_arrived,
        )

    def _collect(self, flight: Any) -> StepOutput:
        plan: StepPlan = flight.plan
        with self._profiler.stage("collect"):
            result = self._runner.collect(flight)
        wanting: dict[int, Request] = {}
        if result.logprobs is not None:
            for i in np.flatnonzero(plan.samples & (plan.params[:, Param.FLAGS] & Flag.LOGPROBS != 0)):
                if (request := self.scheduler.find(int(plan.keys[i]))) is not None:
                    wanting[int(i)] = request
        if result.prompt_logprobs is not None:
            self._gather_prompt_logprobs(plan, result.prompt_logprobs)
        with self._profiler.stage("process"):
            step = self.scheduler.process(plan, result.tokens)
        self._speed.count(len(step.tokens))
        return StepOutput(
            keys=step.keys.tolist(),
            tokens=step.tokens.tolist(),
            finished=[Finished(request.key, reason) for request, reason in step.finished],
            prompts=[PromptScored(r.key, r.num_cached_tokens, r.prompt_logprobs or None) for r in step.first],
            logprobs=_pick_logprobs(step, result.logprobs, wanting) if wanting else {},
        )

    def _gather_prompt_logprobs(self, plan: StepPlan, logprobs: Any) -> None:
        """Each packed token's row says how likely the prompt token after it was."""
        ends = np.cumsum(plan.num_new)
        for i in np.flatnonzero(plan.params[:, Param.FLAGS] & Flag.PROMPT_LOGPROBS):
            request = self.scheduler.find(int(plan.keys[i]))
            if request is None or request.announced:
                continue
            if not request.prompt_logprobs:
                request.prompt_logprobs = [None] * len(request.prompt)
            first = int(ends[i] - plan.num_new[i])
            position = int(plan.start[i]) + 1
            for t in range(first, first + min(int(plan.num_new[i]), len(request.prompt) - position)):
                request.prompt_logprobs[position + t - first] = _token_logprobs(
                    logprobs, t, request.params.prompt_logprobs or 0
                )

    def _stats(self) -> Stats:
        s = self.scheduler
        return Stats(
            num_running=s.num_running,
            num_waiting=len(s.waiting),
            kv_usage=s.kv_usage,
            cached_usage=s.cached_usage,
            gen_throughput=self._speed.tokens_per_s,
            compiles_after_ready=self._runner.compiles_after_ready,
            **dataclasses.asdict(s.counters),
        )

    def _log(self, plan: StepPlan) -> None:
        s = self.scheduler
        if not plan.from_device.all():
            prompt_rows = ~plan.from_device
            logger.info(
                prefill_line(
                    num_new_requests=int(prompt_rows.sum()),
                    num_new_tokens=int(plan.num_new[prompt_rows].sum()),
                    num_cached_tokens=sum(load.num_cached_tokens for load in plan.loads),
                    token_usage=s.kv_usage,
                    num_running=s.num_running,
                    num_waiting=len(s.waiting),
                )
            )
        elif self._speed.interval_is_over():
            logger.info(
                decode_line(
                    num_running=s.num_running,
                    num_tokens=s.num_running_tokens,
                    token_usage=s.kv_usage,
                    gen_throughput=self._speed.tokens_per_s,
                    num_waiting=len(s.waiting),
                )
            )


class _Speedometer:
    """Generated tokens per second over the last interval of decode steps."""

    def __init__(self, interval: int):
        self.tokens_per_s = 0.0
        self._interval = interval
        self._steps = self._tokens = 0
        self._since: float | None = None  # None: nothing has run since the last pause

    def count(self, num_tokens: int) -> None:
        if self._since is None:
            self._since = time.monotonic()
            return  # their time is not known
        self._tokens += num_tokens

    def pause(self) -> None:
        """Nothing runs: the time until the next token is nobody's."""
        self._steps = self._tokens = 0
        self._since = None

    def interval_is_over(self) -> bool:
        """Called once a decode step; at the interval's end updates tokens_per_s and starts the next."""
        self._steps += 1
        if self._steps < self._interval or self._since is None:
            return False
        now = time.monotonic()
        self.tokens_per_s = self._tokens / (now - self._since)
        self._steps = self._tokens = 0
        self._since = now
        return True


def _fold(seed: int) -> int:
    """A seed of up to 64 bits, negative ones included, in 32: small ones stay as they are."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low ^ (high * 0x9E3779B9 & 0xFFFFFFFF)


def _pick_logprobs(step: StepResult, logprobs: Any, wanting: dict[int, Request]) -> dict[int, TokenLogprobs]:
    """By position in the event's keys."""
    return {
        at: _token_logprobs(logprobs, int(i), wanting[int(i)].params.logprobs or 0)
        for at, i in enumerate(step.index)
        if int(i) in wanting
    }


def _token_logprobs(logprobs: Any, i: int, num_top: int) -> TokenLogprobs:
    chosen, ids, values = logprobs
    return TokenLogprobs(float(chosen[i]), ids[i, :num_top].tolist(), values[i, :num_top].tolist())
