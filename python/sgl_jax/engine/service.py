"""The API side of the engine: validates requests, sends them, and turns the engine's tokens into text.

One asyncio loop owns a service. The engine sends one message per step for all requests; `_on_step` only appends tokens
to each request's list and wakes those that have something to do. Detokenising happens in the consumer, which takes
everything that came since it last ran.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import msgspec

from sgl_jax.engine import admission
from sgl_jax.engine.generation import (
    Choice,
    Conflict,
    EngineFailed,
    Generation,
    GenerationRequest,
    ServiceUnavailable,
    Update,
)
from sgl_jax.engine.messages import (
    Abort,
    CacheFlushed,
    Command,
    EngineDied,
    EngineInfo,
    Event,
    FlushCache,
    Generate,
    GetProfile,
    LimitsMeasured,
    MachineLimits,
    MeasureLimits,
    ProfileAnswer,
    ProfileStatus,
    Ready,
    Refused,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
)
from sgl_jax.engine.transport import Transport
from sgl_jax.observability.metrics import RequestMetrics
from sgl_jax.request import FinishReason, InvalidParameter, SamplingParams
from sgl_jax.text.detokenizer import Detokenizer
from sgl_jax.text.tokenizer import Tokenizer


class GenerationService:
    """Everything between a validated API call and the engine's messages."""

    def __init__(
        self,
        transport: Transport,
        tokenizer: Tokenizer,
        *,
        stream_interval: int = 1,
        max_queued_requests: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.stats = Stats()
        self.metrics = RequestMetrics()
        self.accepting = False  # set by open(), cleared by drain()
        self._transport = transport
        self._stream_interval = stream_interval
        self._max_queued = max_queued_requests
        self._info: EngineInfo | None = None
        self._failure: str | None = None
        self._failed = asyncio.Event()
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._choices: dict[int, Choice] = {}  # what the engine runs for us, by key
        self._keys_of: dict[str, list[int]] = {}  # by public id
        self._num_queued = 0  # choices without a token yet
        self._next_key = 1
        self._calls: dict[int, asyncio.Future[Any]] = {}  # commands that are answered, until they are

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Starts the engine and waits until it is ready. Requests are refused until `open`."""
        self._transport.start(self._on_event)
        ready = asyncio.ensure_future(self._ready.wait())
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait((ready, failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            failed.cancel()
        if self._failure is not None:
            raise EngineFailed(self._failure)
        return self.info

    def open(self) -> None:
        """From now on requests are accepted, and measured: the warm-up does not count."""
        self.metrics = RequestMetrics()
        self.accepting = True

    async def drain(self, timeout: float) -> bool:
        """Accepts nothing more and waits for what runs. False if something still does after `timeout` seconds."""
        self.accepting = False
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout: float = 10.0) -> None:
        """Ends every request with an error and the engine with a Shutdown."""
        self.accepting = False
        self._fail_all(ServiceUnavailable("the server is shutting down"))
        await self._transport.close(timeout)

    async def wait_failed(self) -> str:
        """Returns when the engine has died, with its message."""
        await self._failed.wait()
        return self._failure or ""

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise ServiceUnavailable("the engine is still starting")
        return self._info

    @property
    def ready(self) -> bool:
        return self.accepting and self._failure is None

    @property
    def ready_once(self) -> bool:
        """Whether the engine ever got ready; until then it does not listen to commands."""
        return self._info is not None

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def num_live(self) -> int:
        """Choices the engine runs or holds for us."""
        return len(self._choices)

    def check_ready(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine died: {self._failure}")
        if not self.accepting:
            raise ServiceUnavailable(
                "the engine is still starting" if self._info is None else "the server takes no requests now"
            )

    # --- requests -----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, stream: bool = True) -> AsyncIterator[list[Update]]:
        """The updates of one request's choices. See `submit`."""
        generation = self.submit([request], stream)
        try:
            async for updates in generation.updates():
                yield updates
        finally:
            generation.abort()

    def submit(self, requests: Sequence[GenerationRequest], stream: bool) -> Generation:
        """Validates and sends; either all the requests are accepted or none.

        Raises InvalidParameter, QueueFull, ServiceUnavailable or EngineFailed. Without `stream`, the updates of a
        choice come in one piece when it has finished.
        """
        self.check_ready()
        return self._submit([self._checked(request) for request in requests], stream)

    async def warm_up(self, num_tokens: int = 4) -> None:
        """Generates a little before `open`, so that the first user meets a path that has been walked."""
        token = self.tokenizer.bos_token_id or 0
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        generation = self._submit([self._checked(GenerationRequest([token], params))], stream=False)
        async for _ in generation.updates():
            pass

    def abort(self, request_id: str) -> int:
        """Aborts the request with this public id; its consumer gets finish reason "abort". Returns how many choices."""
        keys = [key for key in self._keys_of.get(request_id, ()) if key in self._choices]
        if keys:
            self._transport.send(Abort(keys))
        return len(keys)

    def abort_all(self) -> int:
        keys = list(self._choices)
        if keys:
            self._transport.send(Abort(keys))
        return len(keys)

    async def flush_cache(self) -> int:
        """Drops every cached prefix no request holds; returns the pages that became free."""
        return await self._ask(FlushCache)

    async def measure_limits(self) -> MachineLimits:
        """What the engine's devices can do. Takes seconds, in which the engine does nothing else.

        Raises Conflict while requests run or wait, or where it cannot be measured.
        """
        return await self._ask(MeasureLimits)

    async def start_profile(
        self,
        output_dir: str | None = None,
        num_steps: int | None = None,
        host_tracer_level: int | None = None,
        python_tracer_level: int | None = None,
    ) -> ProfileStatus:
        """Records what engine and device do, from now until stopped or for num_steps steps: see StartProfile.

        Raises Conflict if a profile runs already, InvalidParameter for a folder that cannot be written.
        """
        return await self._ask(
            lambda call: StartProfile(call, output_dir, num_steps, host_tracer_level, python_tracer_level)
        )

    async def stop_profile(self) -> ProfileStatus:
        """Ends the profile and writes it. Raises Conflict if none runs."""
        return await self._ask(StopProfile)

    async def profile_status(self) -> ProfileStatus:
        return await self._ask(GetProfile)

    async def _ask(self, command: Callable[[int], Command]) -> Any:
        """Sends the command made for a new call, and waits for its answer; raises what the engine refuses."""
        self.check_ready()
        call = self._new_key()
        self._transport.send(command(call))  # what cannot be sent leaves nothing behind
        self._calls[call] = future = asyncio.get_running_loop().create_future()
        return await future

    def _checked(self, request: GenerationRequest) -> GenerationRequest:
        return admission.checked(request, self.info, self._keys_of)

    def _submit(self, requests: list[GenerationRequest], stream: bool) -> Generation:
        admission.check_queue(requests, self._num_queued, self._max_queued)
        generation = Generation(self, requests, stream)
        now = time.perf_counter()
        for i, request in enumerate(requests):
            keys = [self._new_key() for _ in range(request.params.n)]
            for index, key in enumerate(keys):
                params = _engine_params(request.params, index)
                self._transport.send(Generate(key, request.prompt_ids, params, request.namespace))
            self._keys_of[request.request_id] = keys
            for index, key in enumerate(keys):
                choice = Choice(key, i, index, generation, self._detokenizer(request), now)
                generation.open.append(choice)
                self._choices[key] = choice
        self._num_queued += len(generation.open)
        self._idle.clear()
        return generation

    def _detokenizer(self, request: GenerationRequest) -> Detokenizer:
        params = request.params
        return Detokenizer(
            self.tokenizer,
            request.prompt_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _new_key(self) -> int:
        key, self._next_key = self._next_key, self._next_key + 1
        return key

    # --- what the consumer takes --------------------------------------------------------------------------------------

    def take(self, choice: Choice) -> Update | None:
        """What came for this choice, as text; None if it is not enough for an update."""
        tokens, reason = choice.tokens, choice.reason
        if reason is None and len(tokens) < choice.wake_at:
            return None
        if choice.generation.stream:
            choice.wake_at = choice.request.params.stream_interval or self._stream_interval
        logprobs, choice.tokens, choice.logprobs = choice.logprobs, [], []
        prompt_logprobs, choice.prompt_logprobs = choice.prompt_logprobs, None
        params = choice.request.params
        shown = tokens
        ended_by_token = reason is not None and reason.type == "stop" and isinstance(reason.matched, int)
        if ended_by_token and not params.include_stop_str_in_output:
            shown = tokens[:-1]
        text, used = choice.detokenizer.push(shown)
        if choice.detokenizer.matched is None and reason is not None:
            text += choice.detokenizer.finish()
        if choice.request.score_only:  # the engine makes a token all the same
            text, tokens, logprobs = "", [], []
            if reason is not None and reason.type != "abort":
                reason = FinishReason("length")
        elif choice.detokenizer.matched is not None:
            tokens, logprobs = tokens[:used], logprobs[:used]
            if reason is None:
                self.drop([choice])
            reason = FinishReason("stop", choice.detokenizer.matched)
        return Update(
            choice.prompt,
            choice.index,
            text,
            tokens,
            logprobs,
            reason,
            choice.num_cached_tokens,
            prompt_logprobs,
        )

    def drop(self, choices: Iterable[Choice]) -> None:
        """Aborts those of the choices that the engine still runs; nobody waits for them any more."""
        live = [choice for choice in choices if choice.key in self._choices]
        if live:
            for choice in live:
                self._forget(choice, "stop" if choice.detokenizer.matched is not None else "abort")
            if self._failure is None:
                self._transport.send(Abort([choice.key for choice in live]))

    def _forget(self, choice: Choice, reason: str) -> None:
        del self._choices[choice.key]
        keys = self._keys_of[choice.request.request_id]
        keys.remove(choice.key)
        if not keys:
            del self._keys_of[choice.request.request_id]
        if choice.last_token_at == 0.0:
            self._num_queued -= 1
        self.metrics.finished[reason] += 1
        self.metrics.request_latency.observe(time.perf_counter() - choice.arrived)
        if not self._choices:
            self._idle.set()

    # --- events of the engine -----------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        match event:
            case StepOutput():
                self._on_step(event)
            case CacheFlushed(call=call, num_pages=num_pages):
                self._answer(call, num_pages)
            case LimitsMeasured(call=call, limits=limits):
                self._answer(call, limits)
            case ProfileAnswer(call=call, status=status):
                self._answer(call, status)
            case Refused(call=call, message=message, param=param):
                self._answer(call, InvalidParameter(param, message) if param else Conflict(message))
            case Ready(info=info):
                self._info = info
                self._ready.set()
            case EngineDied(message=message):
                if self._failure is None:
                    self._failure = message
                    self._fail_all(EngineFailed(f"the engine died: {message}"))
                    self._failed.set()

    def _answer(self, call: int, answer: Any) -> None:
        """To the one who waits, if someone still does."""
        future = self._calls.pop(call, None)
        if future is None or future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_step(self, step: StepOutput) -> None:
        now = time.perf_counter()
        choices, metrics = self._choices, self.metrics
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
                self._num_queued -= 1
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
        if step.stats is not None:
            self.stats = step.stats

    def _fail_all(self, error: Exception) -> None:
        for choice in list(self._choices.values()):
            choice.generation.error = error
            choice.generation.wake.set()
            self._forget(choice, "abort")
        for call in list(self._calls):
            self._answer(call, error)


def _engine_params(params: SamplingParams, index: int) -> SamplingParams:
    """What the engine has to know of choice `index`: stop strings, n and streaming are ours, each choice has its own
    seed."""
    seed = params.seed
    if seed is not None and index:
        seed += index
        if seed >= 2**64:
            seed -= 2**64
    return msgspec.structs.replace(params, n=1, stop=(), stream_interval=None, seed=seed)
