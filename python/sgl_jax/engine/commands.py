"""Commands to the engine core, and their answers, which wait here until the next step is sent."""

import numpy as np

from sgl_jax.engine import messages
from sgl_jax.engine.adapter_loads import Adapters, namespace_of
from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import Command, EngineInfo, Event, Finished
from sgl_jax.engine.profiling import Profiler
from sgl_jax.engine.trainer_calls import TrainerCalls
from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.scheduler import Scheduler


class Commands:
    def __init__(
        self,
        scheduler: Scheduler,
        info: EngineInfo,
        profiler: Profiler,
        adapters: Adapters | None,
        grammars: Grammars | None,
        trainer: TrainerCalls,
        random_seed: int | None,
    ):
        """`adapters`, `grammars`: None in a launch that takes none."""
        self._scheduler, self._info, self._profiler, self._adapters = scheduler, info, profiler, adapters
        self._polled = [each for each in (adapters, grammars) if each is not None]
        self._grammars, self._trainer = grammars, trainer
        self._seeds = np.random.default_rng(random_seed)
        self._num_arrived = 0
        self._answers: list[Event] = []
        self._aborted: list[Finished] = []

    @property
    def has_answers(self) -> bool:
        if self._answers or self._aborted or self._profiler.writing or self._trainer.has_work:
            return True
        return any(each.has_work for each in self._polled) if self._polled else False

    def take_answers(self, at_rest: bool) -> tuple[list[Event], list[Finished]]:
        """Return the answers since the last call, and the requests that were aborted. `at_rest`: no step is in flight."""
        events, ended = self._answers + self._profiler.poll(), self._aborted
        self._answers, self._aborted = [], []
        for each in self._polled:
            said, finished = each.poll(self._scheduler)
            events, ended = events + said, ended + finished
        if self._trainer.has_work:
            said, finished = self._trainer.poll(self._scheduler, at_rest=at_rest)
            events, ended = events + said, ended + finished
        return events, ended

    def handle(self, command: Command) -> None:
        """Carry out a command."""
        match command:
            case messages.Generate():
                self._scheduler.add(self._request(command))
            case messages.Abort(keys=keys):
                reason = FinishReason("abort")
                self._aborted += [Finished(key, reason) for key in keys if self._scheduler.abort(key)]
            case messages.FlushCache(call=call):
                self._answers.append(messages.CacheFlushed(call, self._scheduler.flush()))
            case messages.LoadAdapter() if self._adapters is not None:
                self._adapters.load(command)
            case messages.UnloadAdapter(call=call, adapter=number) if self._adapters is not None:
                self._adapters.unload(call, number)
            case messages.LoadAdapter(call=call) | messages.UnloadAdapter(call=call):
                self._answers.append(
                    messages.Refused(call, "the launch takes no adapters; start it with --enable-lora")
                )
            case messages.CompileGrammar() if self._grammars is not None:
                self._grammars.compile(command)
            case messages.CompileGrammar(call=call, kind=kind):
                self._answers.append(messages.Refused(call, "the launch takes no grammars", kind))
            case (
                messages.PauseGeneration()
                | messages.ContinueGeneration()
                | messages.UpdateWeights()
                | messages.ReleaseMemory()
                | messages.ResumeMemory()
            ):
                self._trainer.handle(command)
            case messages.StartProfile() | messages.StopProfile() | messages.GetProfile():
                answer = self._profiler.handle(command)
                self._answers += [answer] if answer else []

    def _request(self, command: messages.Generate) -> Request:
        params = command.params
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        eos = () if params.ignore_eos else self._info.eos_token_ids
        room = self._info.context_length - len(command.prompt_ids)
        self._num_arrived += 1
        return Request(
            key=command.key,
            prompt=np.array(command.prompt_ids, np.int32),
            params=params,
            namespace=namespace_of(command.adapter, command.namespace),
            adapter=command.adapter,
            urgency=params.priority * self._info.priority_sign,
            seed=_fold(seed),
            max_total_tokens=len(command.prompt_ids)
            + (room if params.max_tokens is None else min(params.max_tokens, room)),
            stop_token_ids=np.array(sorted({*eos, *params.stop_token_ids}), np.int32),
            arrival=self._num_arrived,
            needs_all=(pooling := self._info.pooling) is not None and pooling.method == "mean",
        )


def _fold(seed: int) -> int:
    """Fold a seed of up to 64 bits, which may be negative, into 32 bits. One that fits 32 bits stays as it is."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low ^ (high * 0x9E3779B9 & 0xFFFFFFFF)
