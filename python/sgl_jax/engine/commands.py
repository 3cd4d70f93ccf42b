"""Commands to the engine core, and their answers, which wait here until the next step is sent."""

import numpy as np

from sgl_jax.engine import messages
from sgl_jax.engine.adapter_loads import Adapters, namespace_of
from sgl_jax.engine.messages import Command, EngineInfo, Event, Finished
from sgl_jax.engine.profiling import Profiler
from sgl_jax.request import FinishReason, Request
from sgl_jax.scheduler.scheduler import Scheduler


class Commands:
    def __init__(
        self,
        scheduler: Scheduler,
        info: EngineInfo,
        profiler: Profiler,
        adapters: Adapters | None,
        random_seed: int | None,
    ):
        """`adapters`: None in a launch that takes none."""
        self._scheduler, self._info, self._profiler, self._adapters = scheduler, info, profiler, adapters
        self._seeds = np.random.default_rng(random_seed)
        self._num_arrived = 0
        self._answers: list[Event] = []
        self._aborted: list[Finished] = []

    @property
    def has_answers(self) -> bool:
        return bool(self._answers or self._aborted or self._profiler.writing or self._adapters_work)

    @property
    def _adapters_work(self) -> bool:
        return self._adapters is not None and self._adapters.has_work

    def take_answers(self) -> tuple[list[Event], list[Finished]]:
        """Return the answers since the last call, and the requests that were aborted."""
        events, ended = self._adapters.poll(self._scheduler) if self._adapters is not None else ([], [])
        taken = self._answers + self._profiler.poll() + events, self._aborted + ended
        self._answers, self._aborted = [], []
        return taken

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
            seed=_fold(seed),
            max_total_tokens=len(command.prompt_ids)
            + (room if params.max_tokens is None else min(params.max_tokens, room)),
            stop_token_ids=np.array(sorted({*eos, *params.stop_token_ids}), np.int32),
            arrival=self._num_arrived,
        )


def _fold(seed: int) -> int:
    """Fold a seed of up to 64 bits, which may be negative, into 32 bits. One that fits 32 bits stays as it is."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low ^ (high * 0x9E3779B9 & 0xFFFFFFFF)
