"""Requests on the API side, the updates that answer them, and the state of each choice in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import msgspec

from sgl_jax.engine.messages import DraftCounts, EngineInfo, TokenLogprobs
from sgl_jax.request import MAX_EOS_TOKENS, FinishReason, InvalidParameter, Names, SamplingParams
from sgl_jax.text.detokenizer import Detokenizer
from sgl_jax.text.tokenizer import Tokenizer

_ONLY_WHEN_FINISHED = 1 << 62

type FinishType = Literal["stop", "length", "abort"]
type Drop = Callable[[Iterable[int], FinishType], None]


class ServiceUnavailable(RuntimeError):
    """Refusal because the engine is still starting, or the server is shutting down."""


class QueueFull(RuntimeError):
    """Refusal of a request because too many wait already; they may have left the queue after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Conflict(RuntimeError):
    """Refusal of a command that the engine's state does not allow."""


class EngineFailed(RuntimeError):
    """End of an engine that died; nothing can be generated any more."""


class NotFinite(RuntimeError):
    """Failure of an input whose vector has infinite values, or such that are no numbers; `param` names it."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidParameter):
    """Refusal of a prompt that, with max_tokens, does not fit the context."""


class DuplicateRequestId(InvalidParameter):
    """Refusal of an id that a running request has."""


class UnknownAdapter(InvalidParameter):
    """Refusal of a name that no adapter has."""


@dataclass(slots=True)
class GenerationRequest:
    """One prompt, of which `params.n` choices are generated. `prompt_ids` is empty until `for_prompt` sets it."""

    prompt_ids: list[int]
    params: SamplingParams
    request_id: str = ""  # empty: one is generated
    namespace: str = ""
    adapter: str | None = None  # name of a LoRA adapter; None: the model itself
    names: Names = field(default_factory=dict)  # for error messages; "prompt" among them
    default_max_tokens: int | None = None  # without params.max_tokens: at most so many, or None as many as fit
    in_range: bool = False  # each number has been compared with its limits
    shown_tokens: dict[int, str] = field(
        default_factory=dict
    )  # special tokens that are text even if others are skipped

    def for_prompt(
        self, ids: list[int], name: str, request_id: str | None, namespace: str | None, adapter: str | None = None
    ) -> Self:
        """Return this request for a prompt that the user gave under `name`."""
        given = {"request_id": request_id or "", "namespace": namespace or "", "adapter": adapter}
        return replace(self, prompt_ids=ids, names={**self.names, "prompt": name}, **given)


def engine_params(params: SamplingParams, index: int, ends: tuple[int, ...]) -> SamplingParams:
    """Return the parameters of choice `index` for the engine, which knows no stop strings, no n and no streaming. Each
    choice has its own seed. The tokens `ends` stop it, too, unless end tokens are ignored."""
    seed = params.seed
    if seed is not None and index:
        seed += index
        if seed >= 2**64:
            seed -= 2**64
    stops = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *ends)
    return msgspec.structs.replace(params, n=1, stop=(), stream_interval=None, seed=seed, stop_token_ids=stops)


def extra_ends(tokenizer: Tokenizer, info: EngineInfo) -> tuple[int, ...]:
    """Return the tokens that end an answer for the tokenizer, and of which the engine does not know it."""
    known = info.eos_token_ids
    new = [token for token in tokenizer.end_ids if token not in known and token < info.vocab_size]
    return tuple(new[: MAX_EOS_TOKENS - len(known)])


@dataclass(slots=True)
class Update:
    """Text and tokens that a choice has gained. Its last update has `finish`."""

    prompt: int  # index of its request among those submitted together
    choice: int  # 0 <= choice < n
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]  # one per token, if asked for
    finish: FinishReason | None
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs | None] | None  # with the first update, if asked for
    drafts: DraftCounts  # the choice's so far


@dataclass(eq=False, slots=True)
class Choice:
    """One choice of a request; to the engine it is a request. Gathers tokens until `take` makes text of them."""

    key: int
    prompt: int  # index of its request in the generation
    index: int  # 0 <= index < n
    generation: Generation
    request: GenerationRequest
    detokenizer: Detokenizer
    stream_interval: int  # tokens per update after the first, in a stream
    arrived: float
    last_token_at: float = 0.0  # 0: no token yet
    wake_at: int = field(init=False)  # so many tokens make an update
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # until it is handed out
    drafts: DraftCounts = field(default_factory=DraftCounts)
    vector: bytes | None = None  # in a pooling launch, when it is finished
    reason: FinishReason | None = None  # why the engine ended it

    def __post_init__(self) -> None:
        self.wake_at = 1 if self.generation.stream or self.request.params.stop else _ONLY_WHEN_FINISHED
        if not self.generation.stream:
            self.stream_interval = self.wake_at

    def take(self) -> Update | None:
        """Turn the gathered tokens into an update; None if they are too few for one."""
        tokens, reason = self.tokens, self.reason
        if reason is None and len(tokens) < self.wake_at:
            return None
        self.wake_at = self.stream_interval
        logprobs, self.tokens, self.logprobs = self.logprobs, [], []
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        shown = tokens
        ended_by_token = reason is not None and reason.type == "stop" and isinstance(reason.matched, int)
        if ended_by_token and not self.request.params.include_stop_str_in_output:
            shown = tokens[:-1]
        detokenizer = self.detokenizer
        text, used = detokenizer.push(shown)
        if reason is not None and detokenizer.matched is None:
            text += detokenizer.finish()
        if detokenizer.matched is not None:
            tokens, logprobs = tokens[:used], logprobs[:used]
            reason = FinishReason("stop", detokenizer.matched)
        cached = self.num_cached_tokens
        return Update(self.prompt, self.index, text, tokens, logprobs, reason, cached, prompt_logprobs, self.drafts)


class Generation:
    """Requests submitted together, and their choices. Iterate `updates()` once; leaving it early aborts the rest.

    `drop` tells the engine that nobody waits for the choices with these keys; those that have finished are ignored.
    """

    def __init__(self, requests: list[GenerationRequest], stream: bool, drop: Drop):
        self.requests = requests
        self.stream = stream
        self.created = time.time()
        self.num_tokens = 0  # generated so far
        self.first_token_at: float | None = None  # the first choice's, by perf_counter
        self.queue_seconds: float | None = None  # the longest time that a choice waited for its first step
        self._drop = drop
        self.open: list[Choice] = []
        self.wake = asyncio.Event()
        self.error: Exception | None = None
        self._finished: dict[tuple[int, int], FinishType] = {}  # by prompt and choice

    @property
    def finish_types(self) -> list[FinishType]:
        """Why each choice ended; "abort" for one that is still open."""
        places = ((prompt, i) for prompt, request in enumerate(self.requests) for i in range(request.params.n))
        return [self._finished.get(place, "abort") for place in places]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def adapters(self) -> set[str]:
        """Names of the LoRA adapters that the requests use."""
        return {request.adapter for request in self.requests if request.adapter is not None}

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield the updates since the last turn, at most one per choice. Raises EngineFailed or ServiceUnavailable."""
        try:
            while self.open:
                await self.wake.wait()
                self.wake.clear()
                if self.error is not None:
                    raise self.error
                if found := self._take():
                    yield found
        finally:
            self.abort()

    def _take(self) -> list[Update]:
        found, still_open = [], []
        for choice in self.open:
            update = choice.take()
            if update is not None:
                found.append(update)
                self.num_tokens += len(update.token_ids)
            if update is None or update.finish is None:
                still_open.append(choice)
                continue
            self._finished[choice.prompt, choice.index] = update.finish.type
            if choice.reason is None:  # a stop string, which the engine does not know, has matched
                self._drop([choice.key], "stop")
        self.open = still_open
        return found

    def abort(self) -> None:
        """Stop the choices that still run. `updates` yields nothing more."""
        self._drop([choice.key for choice in self.open], "abort")
        self.open = []
