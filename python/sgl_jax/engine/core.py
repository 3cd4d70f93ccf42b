"""Core of the engine: plan a step, launch it, collect the one before.

A step is launched before the tokens of the previous one have been read. The step in flight is a value that one call of
`step` leaves and the next collects. Without overlap a call collects the step that it launched; the tokens are the same.
"""

import time
from typing import Protocol

import msgspec

from sgl_jax.engine.adapter_loads import Adapters
from sgl_jax.engine.commands import Commands
from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import Command, EngineInfo, Event, Finished, PromptScored, StepOutput
from sgl_jax.engine.pooler import Pooler
from sgl_jax.engine.profiling import Profiler, Tracer
from sgl_jax.engine.scores import gather_prompt_scores, scores_of_tokens
from sgl_jax.engine.statistics import Statistics
from sgl_jax.engine.trainer_calls import TrainerCalls
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.step_plan import Flight, StepPlan


class Runner(Protocol):
    """Device side, as the core needs it (runtime.runner, or testing.fake_runner)."""

    @property
    def compiles_after_ready(self) -> int: ...

    @property
    def num_compiling(self) -> int:
        """Programs that are not compiled yet. Raises the error of one that cannot be."""

    @property
    def tracer(self) -> Tracer: ...

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether the plan's programs are compiled."""

    def launch(self, plan: StepPlan) -> Flight: ...

    def close(self) -> None: ...


_WAIT_S = 0.02  # between two looks at a program that compiles or a profile that is written


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
        draft_model: str = "",
        adapters: Adapters | None = None,
        grammars: Grammars | None = None,
        pooler: Pooler | None = None,
        trainer: TrainerCalls | None = None,
    ):
        """`draft_model`: name of the model that makes drafts, whose acceptance is watched; empty: there is none. `adapters`: those
        whose slots the scheduler has; `grammars`: those in which it finds grammars; None in a launch that takes none.
        `pooler`: None in a launch that generates."""
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self.grammars = grammars
        self.trainer = trainer or TrainerCalls()
        self._overlap = overlap
        self.pooler = pooler
        self._profiler = Profiler(runner.tracer, profiler_dir)
        self._commands = Commands(scheduler, info, self._profiler, adapters, grammars, self.trainer, random_seed)
        self._statistics = Statistics(scheduler, decode_log_interval, draft_model, info.simulated, grammars)
        self._planned: StepPlan | None = None  # a step whose programs are not compiled yet
        self._in_flight: Flight | None = None
        self._num_compiling = 0  # as the last step found it

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do; if not, the loop may sleep until a command comes."""
        compiles = self._num_compiling > 0 or self.runner.num_compiling > 0
        return self._has_steps or self._commands.has_answers or compiles

    @property
    def _has_steps(self) -> bool:
        may_run = self.scheduler.has_requests and not self.trainer.holds
        return may_run or self._planned is not None or self._in_flight is not None

    def handle(self, command: Command) -> None:
        """Take in a command. Its answer, if it has one, comes out of the next `step`."""
        self._commands.handle(command)

    def step(self) -> list[Event]:
        """Plan and launch a step, then collect the one before it (or itself, without overlap). Return the answers to
        commands, and one StepOutput if there is anything to report."""
        events, aborted = self._commands.take_answers(self._planned is None and self._in_flight is None)
        output = StepOutput(finished=aborted) if aborted else None
        with self._profiler.step():
            launched = self._launch()
            if self._overlap:
                launched, self._in_flight = self._in_flight, launched
            if launched is not None:
                output = self._collect(launched, aborted)
        if launched is not None:
            self._profiler.collected()
        waits_for_programs = self.busy and launched is None and self._in_flight is None and not events
        if waits_for_programs:
            self._statistics.steps.pause()
            time.sleep(_WAIT_S)
        elif not self._has_steps:
            self._statistics.pause()
            self.scheduler.check_invariants()
        compiles, self._num_compiling = self.runner.compiles_after_ready, self.runner.num_compiling
        idle = not self._has_steps and not (waits_for_programs and self._num_compiling)
        if (stats := self._statistics.take_due(compiles, self._num_compiling, idle=idle)) is not None:
            output = msgspec.structs.replace(output or StepOutput(), stats=stats)
        return events if output is None else [*events, output]

    def close(self, reason: str = "") -> None:
        """End the core, and write a profile that still runs. Nothing may be called afterwards."""
        self._profiler.close()
        if self.grammars is not None:
            self.grammars.close()
        self.runner.close()

    def _launch(self) -> Flight | None:
        """Plan a step and start it; None if there is nothing to do, or a program of the step is not compiled yet. The
        planned step is then the next one: later plans count on what it computes."""
        with self._profiler.stage("plan"):
            plan = self._planned or (None if self.trainer.holds else self.scheduler.schedule())
        self._planned = plan if plan is not None and not self.runner.can_launch(plan) else None
        if plan is None or self._planned is not None:
            return None
        with self._profiler.stage("dispatch"):
            launched = self.runner.launch(plan)
        self._profiler.launched()
        self._statistics.steps.launched()
        self._statistics.log(plan)
        return launched

    def _collect(self, flight: Flight, aborted: list[Finished]) -> StepOutput:
        """Wait for a launched step, and return its tokens and the requests that finished in it or were aborted."""
        plan = flight.plan
        with self._profiler.stage("collect"):
            tokens = flight.collect()
        seconds = self._statistics.steps.collected(decodes=bool(plan.from_device.all()))
        with self._profiler.stage("process"):
            step = self.scheduler.process(plan, tokens, None if self._num_compiling else seconds)
        self._statistics.speed.count(len(step.tokens))
        if tokens.prompt_logprobs is not None:
            gather_prompt_scores(plan, step.scored, tokens.prompt_logprobs)
        return StepOutput(
            keys=step.keys.tolist(),
            tokens=step.tokens.tolist(),
            finished=[*aborted, *(Finished(request.key, reason) for request, reason in step.finished)],
            prompts=[
                PromptScored(r.key, r.num_cached_tokens, r.prompt_logprobs or None, r.queue_seconds) for r in step.first
            ],
            logprobs={} if tokens.logprobs is None else scores_of_tokens(plan, step, tokens.logprobs),
            drafts=step.drafts.tolist(),
            pooled=self.pooler.vectors(plan, tokens.hidden, step, self.scheduler.requests) if self.pooler else [],
        )
