"""Calls of a trainer, on the API side, and what they have changed: the weights in use, and whether generation is held."""

import asyncio
from collections.abc import Callable, Sequence
from typing import get_args

from sgl_jax.engine.adapter_table import Ask
from sgl_jax.engine.messages import (
    Command,
    ContinueGeneration,
    MemoryTag,
    PauseGeneration,
    PauseMode,
    ReleaseMemory,
    ResumeMemory,
    StateChanged,
    UpdateWeights,
    WeightsFormat,
)
from sgl_jax.request import InvalidParameter

ALL_TAGS: tuple[MemoryTag, ...] = get_args(MemoryTag)


class TrainerTable:
    def __init__(self, ask: Ask):
        self.holds = False  # the engine plans no step until another call
        self.model_path: str | None = None  # None: the launch's weights are in use
        self.weight_version = "default"
        self.num_calls = 0  # calls in progress, which may take longer than any step
        self._ask = ask

    def see(self, event: StateChanged) -> None:
        """Take in what the engine says, whether or not a caller still waits for it."""
        self.holds = event.holds
        if event.weights is not None:
            self.model_path, version = event.weights
            self.weight_version = version or "default"

    async def pause(self, mode: PauseMode = "abort") -> StateChanged:
        """Plan no step from now on, and answer when none is in flight. Raises InvalidParameter."""
        _check_choices("mode", [mode], get_args(PauseMode))
        return await self._call(lambda call: PauseGeneration(call, mode))

    async def go_on(self) -> StateChanged:
        return await self._call(ContinueGeneration)

    async def update(
        self,
        model_path: str,
        load_format: WeightsFormat = "auto",
        *,
        abort_all_requests: bool = False,
        flush_cache: bool = True,
        weight_version: str | None = None,
    ) -> StateChanged:
        """Use other weights of the same model. Raises InvalidParameter for those that do not fit, Conflict if the engine cannot
        take any now or at all."""
        _check_choices("load_format", [load_format], get_args(WeightsFormat))
        if not flush_cache:
            cure = "the cached prefixes are the old weights' and always go: leave it out"
            raise InvalidParameter("flush_cache", f"flush_cache is false; {cure}")
        for name, text in (("model_path", model_path), ("weight_version", weight_version or "")):
            if not text.isprintable() or (not text and name == "model_path"):
                raise InvalidParameter(name, f"{name} is {text!r}; it must be a text of visible characters")
        given = model_path, load_format, abort_all_requests, weight_version or ""
        return await self._call(lambda call: UpdateWeights(call, *given))

    async def release(self, tags: Sequence[MemoryTag] | None = None) -> StateChanged:
        """Give back the devices' memory of KV and weights, or of one of them. Raises InvalidParameter or Conflict."""
        chosen = _tags(tags)
        return await self._call(lambda call: ReleaseMemory(call, chosen))

    async def resume(self, tags: Sequence[MemoryTag] | None = None) -> StateChanged:
        """Take the memory again: empty pages, and the weights. Raises InvalidParameter or Conflict."""
        chosen = _tags(tags)
        return await self._call(lambda call: ResumeMemory(call, chosen))

    async def _call(self, command: Callable[[int], Command]) -> StateChanged:
        """Send a call, and count it until it is answered, even if its caller goes away."""
        self.num_calls += 1
        task = asyncio.ensure_future(self._ask(command, StateChanged))
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[StateChanged]) -> None:
        self.num_calls -= 1
        if not task.cancelled():
            task.exception()  # which nobody may wait for


def _tags(tags: Sequence[MemoryTag] | None) -> list[MemoryTag]:
    if tags is None:
        return [*ALL_TAGS]
    if not tags:
        raise InvalidParameter("tags", f"tags is empty; it may have {', '.join(ALL_TAGS)}, or be left out for all")
    _check_choices("tags", tags, ALL_TAGS)
    return [*tags]


def _check_choices(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if wrong := [each for each in given if each not in allowed]:
        raise InvalidParameter(name, f"{name} has {wrong[0]!r}; it may have {', '.join(allowed)}")
