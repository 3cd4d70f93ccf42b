"""Choices that the engine runs for this process. One message per step brings the tokens of all of them."""

import asyncio
import time
from collections.abc import Iterable

from sgl_jax.engine.generation import Choice, Conflict, FinishType, Generation, GenerationRequest
from sgl_jax.engine.messages import DraftCounts, StepOutput
from sgl_jax.engine.waiting_queue import WaitingQueue
from sgl_jax.observability.metrics import RequestMetrics


class LiveChoices:
    """Choices by key and by public id, from their Generate message until they are finished or dropped."""

    def __init__(self) -> None:
        self.metrics = RequestMetrics()
        self.queue = WaitingQueue()
        self.error: Exception | None = None  # why no choice can go on
        self.idle = asyncio.Event()
        self.idle.set()
        self.keys_of: dict[str, list[int]] = {}  # by public id
        self._by_key: dict[int, Choice] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def keys(self) -> list[int]:
        return list(self._by_key)

    def expect(self, requests: Iterable[GenerationRequest]) -> None:
        """Take the ids of requests that are about to be sent, and places in the queue for their choices."""
        for request in requests:
            self.keys_of[request.request_id] = []
            self.queue.join(request.params.n)
            self.idle.clear()

    def unexpect(self, requests: Iterable[GenerationRequest]) -> None:
        """Give back what `expect` took for requests that are not sent after all."""
        for request in requests:
            del self.keys_of[request.request_id]
            self.queue.leave(request.params.n, served=False)
        self._set_idle()

    def add(self, choices: Iterable[Choice]) -> None:
        """Let the choices of an expected request live."""
        for choice in choices:
            self._by_key[choice.key] = choice
            self.keys_of[choice.request.request_id].append(choice.key)

    def drop(self, keys: Iterable[int], outcome: FinishType) -> list[int]:
        """Forget those of the choices that are still live, and return their keys."""
        live = [key for key in keys if key in self._by_key]
        for key in live:
            self._forget(self._by_key[key], outcome)
        return live

    def less_urgent(self, priority: int, sign: int, places: int) -> list[Generation]:
        """Return the generations that make way for a request of this priority: the least urgent, of those the latest,
        that have no token yet, until they hold so many places of the queue. None if all that could hold fewer.

        `sign` is that of EngineInfo.priority_sign.
        """

        def urgency(generation: Generation) -> int:
            return max(sign * request.params.priority for request in generation.requests)

        by_arrival = dict.fromkeys(choice.generation for choice in self._by_key.values())
        waiting = [each for each in reversed(by_arrival) if self._waits(each)]
        found: list[Generation] = []
        for each in sorted(waiting, key=urgency):
            if urgency(each) >= sign * priority:
                return []
            found.append(each)
            places -= len(each.open)
            if places <= 0:
                return found
        return []

    def _waits(self, generation: Generation) -> bool:
        """Whether all choices of the generation have been sent, and none has a token."""
        num_choices = sum(request.params.n for request in generation.requests)
        waiting = [c for c in generation.open if c.key in self._by_key and c.last_token_at == 0.0]
        return len(waiting) == num_choices

    def fail(self, error: Exception) -> None:
        """End every choice with the error; there will be no more."""
        self.error = error
        for choice in list(self._by_key.values()):
            choice.generation.error = error
            choice.generation.wake.set()
            self._forget(choice, "abort")

    def push(self, step: StepOutput) -> None:
        """Append the step's tokens to their choices and wake the consumers that have something to do."""
        now = time.perf_counter()
        choices, metrics = self._by_key, self.metrics
        for scored in step.prompts:
            if (choice := choices.get(scored.key)) is not None:
                choice.num_cached_tokens = scored.num_cached_tokens
                choice.prompt_logprobs = scored.logprobs
                choice.generation.queue_seconds = max(choice.generation.queue_seconds or 0.0, scored.queue_seconds)
        for key, drafted, accepted in step.drafts:
            if (choice := choices.get(key)) is not None:
                steps, all_drafted, all_accepted = choice.drafts
                choice.drafts = DraftCounts(steps + 1, all_drafted + drafted, all_accepted + accepted)
        for key, token in zip(step.keys, step.tokens, strict=True):
            if (choice := choices.get(key)) is None:  # aborted meanwhile
                continue
            choice.tokens.append(token)
            if choice.last_token_at == 0.0:
                self.queue.leave()
                metrics.time_to_first_token.observe(now - choice.arrived)
                choice.generation.first_token_at = choice.generation.first_token_at or now
            else:
                metrics.inter_token_latency.observe(now - choice.last_token_at)
            choice.last_token_at = now
            if len(choice.tokens) >= choice.wake_at:
                choice.generation.wake.set()
        for i, logprobs in step.logprobs.items():
            if (choice := choices.get(step.keys[i])) is not None:
                choice.logprobs.append(logprobs)
        for pooled in step.pooled:
            if (choice := choices.get(pooled.key)) is not None:
                choice.vector = pooled.vector
        for finished in step.finished:
            if (choice := choices.get(finished.key)) is not None:
                choice.reason = finished.reason
                if (why := finished.reason.message) is not None:
                    choice.generation.error = Conflict(why)
                choice.generation.wake.set()
                self._forget(choice, finished.reason.type if choice.vector is None else "stop")

    def _forget(self, choice: Choice, outcome: FinishType) -> None:
        del self._by_key[choice.key]
        keys = self.keys_of[choice.request.request_id]
        keys.remove(choice.key)
        if not keys:
            del self.keys_of[choice.request.request_id]
        if choice.last_token_at == 0.0:
            self.queue.leave(served=outcome != "abort")
        self.metrics.finished[outcome] += 1
        self.metrics.request_latency.observe(time.perf_counter() - choice.arrived)
        self._set_idle()

    def _set_idle(self) -> None:
        if not self.keys_of:
            self.idle.set()
