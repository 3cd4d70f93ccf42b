"""Requests on the API side: what is asked, what comes back, and the state of each choice in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.request import FinishReason, InvalidParameter, SamplingParams
from sgl_jax.text.detokenizer import Detokenizer

_ONLY_WHEN_FINISHED = 1 << 62


class ServiceUnavailable(RuntimeError):
    """Not now: the engine is still starting, or the server is shutting down."""


class QueueFull(RuntimeError):
    """Too many requests wait already."""


class Conflict(RuntimeError):
    """What was asked cannot be done in the state the engine is in."""


class EngineFailed(RuntimeError):
    """The engine died; nothing can be generated any more."""


class PromptTooLong(InvalidParameter):
    """Prompt and max_tokens do not fit the context."""


class DuplicateRequestId(InvalidParameter):
    """A running request has this id."""


@dataclass(slots=True)
class GenerationRequest:
    """One prompt. `params.n` choices of it are generated."""

    prompt_ids: list[int]
    params: SamplingParams
    request_id: str = ""  # made up when empty
    namespace: str = ""
    prompt_field: str = "prompt"  # what the user called the prompt, for error messages
    score_only: bool = False  # the prompt's logprobs are wanted, nothing is to be generated


@dataclass(slots=True)
class Update:
    """What is new of one choice. A choice's last update has `finish`."""

    prompt: int  # index of its request among those submitted together
    choice: int  # 0 <= choice < n
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]  # one per token, if asked for
    finish: FinishReason | None
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs | None] | None  # with the first update, if asked for


class Choice:
    """One request of the engine. Tokens gather here until the consumer takes them."""

    __slots__ = (
        "arrived",
        "detokenizer",
        "generation",
        "index",
        "key",
        "last_token_at",
        "logprobs",
        "num_cached_tokens",
        "prompt",
        "prompt_logprobs",
        "reason",
        "request",
        "tokens",
        "wake_at",
    )

    def __init__(self, key: int, prompt: int, index: int, generation: Generation, detokenizer: Detokenizer, now: float):
        self.key, self.prompt, self.index = key, prompt, index
        self.generation = generation
        self.request = generation.requests[prompt]
        self.detokenizer = detokenizer
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None  # until it is handed out
        self.reason: FinishReason | None = None
        self.arrived = now
        self.last_token_at = 0.0  # 0: no token yet
        self.wake_at = 1 if generation.stream or self.request.params.stop else _ONLY_WHEN_FINISHED


class Source(Protocol):
    """What a Generation needs of the service."""

    def take(self, choice: Choice) -> Update | None: ...

    def drop(self, choices: Iterable[Choice]) -> None: ...


class Generation:
    """Requests submitted together and their choices. Iterate `updates()` once; leaving it early aborts the rest."""

    def __init__(self, source: Source, requests: list[GenerationRequest], stream: bool):
        self.requests = requests
        self.stream = stream
        self.created = time.time()
        self._source = source
        self.open: list[Choice] = []
        self.wake = asyncio.Event()
        self.error: Exception | None = None

    async def updates(self) -> AsyncIterator[list[Update]]:
        """What came since the last turn, at most one update per choice. Raises EngineFailed or ServiceUnavailable."""
        try:
            while self.open:
                await self.wake.wait()
                self.wake.clear()
                if self.error is not None:
                    raise self.error
                found = [update for choice in self.open if (update := self._source.take(choice)) is not None]
                if found:
                    if any(update.finish is not None for update in found):
                        done = {(update.prompt, update.choice) for update in found if update.finish is not None}
                        self.open = [c for c in self.open if (c.prompt, c.index) not in done]
                    yield found
        finally:
            self.abort()

    def abort(self) -> None:
        """Stops what still runs. Nothing more comes out of `updates`."""
        self._source.drop(self.open)
        self.open = []
