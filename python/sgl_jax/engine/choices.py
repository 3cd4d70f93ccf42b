"""Choices that the engine runs for this process. One message per step brings the tokens of all of them."""

import asyncio
import time
from collections.abc import Iterable

from sgl_jax.engine.generation import Choice, FinishType
from sgl_jax.engine.messages import StepOutput
from sgl_jax.observability.metrics import RequestMetrics


class LiveChoices:
    """Choices by key and by public id, from their Generate message until they are finished or dropped."""

    def __init__(self) -> None:
        self.metrics = RequestMetrics()
        self.num_queued = 0  # choices without a token yet
        self.idle = asyncio.Event()
        self.idle.set()
        self.keys_of: dict[str, list[int]] = {}  # by public id
        self._by_key: dict[int, Choice] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def keys(self) -> list[int]:
        return list(self._by_key)

    def add(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            self._by_key[choice.key] = choice
            self.keys_of.setdefault(choice.request.request_id, []).append(choice.key)
            self.num_queued += 1
            self.idle.clear()

    def drop(self, keys: Iterable[int], outcome: FinishType) -> list[int]:
        """Forget those of the choices that are still live, and return their keys."""
        live = [key for key in keys if key in self._by_key]
        for key in live:
            self._forget(self._by_key[key], outcome)
        return live

    def fail(self, error: Exception) -> None:
        """End every choice with the error."""
        for choice in list(self._by_key.values()):
            choice.generation.error = error
            choice.generation.wake.set()
            self._forget(choice, "abort")

    def push(self, step: StepOutput) -> None:
        """Append the step's tokens to their choices and wake the consumers that have something to do."""
        now = time.perf_counter()
        choices, metrics = self._by_key, self.metrics
        for scored in step.prompts:
            choice = choices.get(scored.key)
            if choice is not None:
                choice.num_cached_tokens = scored.num_cached_tokens
                choice.prompt_logprobs = scored.logprobs
        for key, token in zip(step.keys, step.tokens, strict=True):
            choice = choices.get(key)
            if choice is None:  # aborted meanwhile
                continue
            choice.tokens.append(token)
            if choice.last_token_at == 0.0:
                self.num_queued -= 1
                metrics.time_to_first_token.observe(now - choice.arrived)
            else:
                metrics.inter_token_latency.observe(now - choice.last_token_at)
            choice.last_token_at = now
            if len(choice.tokens) >= choice.wake_at:
                choice.generation.wake.set()
        for i, logprobs in step.logprobs.items():
            choice = choices.get(step.keys[i])
            if choice is not None:
                choice.logprobs.append(logprobs)
        for finished in step.finished:
            choice = choices.get(finished.key)
            if choice is not None:
                choice.reason = finished.reason
                choice.generation.wake.set()
                self._forget(choice, finished.reason.type)

    def _forget(self, choice: Choice, outcome: FinishType) -> None:
        del self._by_key[choice.key]
        keys = self.keys_of[choice.request.request_id]
        keys.remove(choice.key)
        if not keys:
            del self.keys_of[choice.request.request_id]
        if choice.last_token_at == 0.0:
            self.num_queued -= 1
        self.metrics.finished[outcome] += 1
        self.metrics.request_latency.observe(time.perf_counter() - choice.arrived)
        if not self._by_key:
            self.idle.set()
