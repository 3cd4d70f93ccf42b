"""API side of the engine: checks requests, sends them, and hands the engine's events to their consumers.

One asyncio loop owns a service. The engine sends one message per step for all requests; `LiveChoices.push` only appends
tokens to each choice's list and wakes the consumers that have something to do. A consumer detokenises all tokens that
came since it last ran.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

from sgl_jax.engine import checks, messages
from sgl_jax.engine.adapter_table import AdapterTable, Answer
from sgl_jax.engine.choices import LiveChoices
from sgl_jax.engine.encoding import Encoded, EncodeRequest, check_task, generation_requests, probe_params, vectors
from sgl_jax.engine.generation import (
    Choice,
    Conflict,
    EngineFailed,
    FinishType,
    Generation,
    GenerationRequest,
    QueueFull,
    ServiceUnavailable,
    engine_params,
    extra_ends,
)
from sgl_jax.engine.grammar_table import GrammarTable
from sgl_jax.engine.messages import Command, EngineInfo, Event, ProfileStatus, Starting, Stats
from sgl_jax.engine.slices import SLICE, in_slices
from sgl_jax.engine.trainer_table import TrainerTable
from sgl_jax.engine.transport import Transport
from sgl_jax.engine.watchdog import Watchdog
from sgl_jax.observability.metrics import RequestMetrics
from sgl_jax.request import InvalidParameter, Names
from sgl_jax.text.detokenizer import Detokenizer
from sgl_jax.text.tokenizer import Tokenizer


class GenerationService:
    """Turns API calls into the engine's messages, and its events into answers."""

    def __init__(
        self,
        transport: Transport,
        tokenizer: Tokenizer,
        stream_interval: int = 1,
        max_queued_requests: int | None = None,
        watchdog: Watchdog | None = None,
        lora_dir: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.stats = Stats()
        self.accepting = False  # set by open(), cleared by drain()
        self._transport = transport
        self._stream_interval = stream_interval
        self._max_queued = max_queued_requests
        self._watchdog = watchdog or Watchdog()
        self._watching: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self.starting: Starting | None = None  # how far the start is, once that is known
        self._adapters: AdapterTable | None = None
        self._grammars = GrammarTable(self._ask)
        self.trainer = TrainerTable(self._ask)
        self._lora_dir = lora_dir
        self.failure: str | None = None  # why the engine has died
        self.failed = asyncio.Event()  # set when it has died
        self._settled = asyncio.Event()  # set when it is ready or has died
        self._choices = LiveChoices()
        self._keys = itertools.count(1)
        self._calls = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}  # by the number of a call that waits

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready. Requests are refused until `open`. Raises EngineFailed."""
        self._transport.start(self._on_event)
        await self._settled.wait()
        if self.failure is not None:
            raise EngineFailed(self.failure)
        watching = self._watchdog.run(self._has_work, self._give_up)
        self._watching = asyncio.create_task(watching)
        return self.info

    def open(self) -> None:
        """Accept requests from now on, and begin to measure them: the warm-up does not count."""
        self._choices.metrics = RequestMetrics()
        self.accepting = True

    async def drain(self, timeout: float) -> bool:
        """Accept no more requests and wait for those that run. False if some still run after `timeout` seconds."""
        self.accepting = False
        try:
            await asyncio.wait_for(self._choices.idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout: float = 10.0) -> None:
        """End every request with an error and the engine with a Shutdown."""
        self.accepting = False
        self._fail_all(ServiceUnavailable("the server is shutting down"))
        if self._watching is not None and not self._watching.cancel():  # it has ended, because the engine hangs
            timeout = 0.0
        await self._transport.close(timeout)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._unavailable
        return self._info

    @property
    def adapters(self) -> AdapterTable:
        if self._adapters is None:
            raise self._unavailable
        return self._adapters

    @property
    def _unavailable(self) -> ServiceUnavailable:
        far = f": weights {now.weights:.0%}, programs {now.programs_text}" if (now := self.starting) else ""
        return ServiceUnavailable(f"the engine is still starting{far}")

    @property
    def ready_once(self) -> bool:
        """Whether the engine has been ready; until then it does not read commands."""
        return self._info is not None

    @property
    def metrics(self) -> RequestMetrics:
        return self._choices.metrics

    @property
    def num_live(self) -> int:
        """Number of choices that have not ended."""
        return len(self._choices)

    def check_ready(self) -> None:
        """Raises EngineFailed or ServiceUnavailable unless requests are accepted."""
        if self.failure is not None:
            raise EngineFailed(f"the engine died: {self.failure}")
        if not self.accepting:
            raise self._unavailable if self._info is None else ServiceUnavailable("the server takes no requests now")

    def check_progress(self) -> None:
        """Raises ServiceUnavailable while the engine seems to hang, and what check_ready does."""
        self.check_ready()
        if problem := self._watchdog.problem:
            raise ServiceUnavailable(problem)

    def _has_work(self) -> bool:
        """Whether the engine should make progress. Reading an adapter or weights, or compiling a grammar, may take longer than
        any step; a trainer may hold generation."""
        num_slow = self.adapters.num_calls + self._grammars.num_calls + self.trainer.num_calls
        return (bool(self._choices) and not self.trainer.holds) or len(self._answers) > num_slow

    def _give_up(self, reason: str) -> None:
        self._on_event(messages.EngineDied(f"{reason} while {len(self._choices)} requests wait"))

    def check_count(self, num_prompts: int, n: int, names: Names) -> None:
        """Check the number of a call's choices before its prompts are encoded. Raises InvalidParameter or QueueFull."""
        try:
            checks.check_room(num_prompts, num_prompts * n, n, names, self._choices.queue, self._max_queued)
        except QueueFull:
            if not self.info.priority_sign:  # otherwise others may make way, which `submit` finds out
                raise

    async def submit(self, requests: Sequence[GenerationRequest], stream: bool) -> Generation:
        """Check and send requests, of which either all are accepted or none.

        Without `stream` a choice is updated when it ends, or sooner if it has stop strings. Raises InvalidParameter,
        QueueFull, ServiceUnavailable or EngineFailed.
        """
        self.check_ready()
        check_task(self.info, pools=False)
        return await self._submit(requests, stream)

    async def encode(self, requests: Sequence[EncodeRequest]) -> list[Encoded]:
        """Return the vectors of prompts, of which either all are accepted or none; cancelled, abort them. Raises what
        `submit` raises, Conflict for one that is aborted, and NotFinite."""
        self.check_ready()
        check_task(self.info, pools=True)
        if not requests:
            return []
        self.check_count(len(requests), 1, {"prompt": requests[0].name.partition("[")[0] or "input"})
        return await vectors(await self._submit(generation_requests(requests), stream=False))

    async def probe(self, num_tokens: int) -> None:
        """Generate a little, or make a vector, also before `open`. Cancelled, it aborts its request. Raises ServiceUnavailable
        during a pause."""
        if self.trainer.holds:
            raise ServiceUnavailable("generation is paused, or memory is released")
        asked = GenerationRequest([self.tokenizer.bos_token_id or 0], probe_params(num_tokens, self.info))
        generation = await self._submit([asked], stream=False, sheds=False)
        async for _ in generation.updates():
            pass

    def abort(self, request_id: str) -> int:
        """Abort the request with this id, whose consumer gets finish reason "abort". Return its number of choices."""
        return self._abort(self._choices.keys_of.get(request_id, []))

    def abort_all(self) -> int:
        return self._abort(self._choices.keys())

    def _abort(self, keys: Sequence[int]) -> int:
        if keys:
            self._transport.send(messages.Abort([*keys]))
        return len(keys)

    async def _submit(self, requests: Sequence[GenerationRequest], stream: bool, *, sheds: bool = True) -> Generation:
        """`sheds`: less urgent requests without a token may be ended for these, where priorities count."""
        await self.adapters.prepare(requests)
        checked = [checks.checked(request, self.info) async for request in in_slices(requests)]
        checks.check_ids(checked, self._choices.keys_of)
        each_n = [request.params.n for request in checked]
        sheds = sheds and bool(self.info.priority_sign)
        self._check_room(checked, each_n, sheds)
        generation = Generation(checked, stream, self._drop)
        self._choices.expect(checked)
        num_sent = 0
        try:
            await self._grammars.prepare(checked, self.info.takes_grammars)
            if sheds:
                self._make_room(checked)
            async for request in in_slices(checked, max(1, SLICE // max(each_n))):
                if self._choices.error is not None:
                    raise self._choices.error
                self._send(generation, num_sent, request)
                num_sent += 1
        except BaseException:
            self._choices.unexpect(checked[num_sent:])
            generation.abort()
            raise
        return generation

    def _check_room(self, requests: Sequence[GenerationRequest], each_n: Sequence[int], sheds: bool) -> None:
        """Check that the queue has room for `each_n` choices, or that with `sheds` others can make way. Raises QueueFull or
        InvalidParameter."""
        queue, limit = self._choices.queue, self._max_queued
        try:
            checks.check_room(len(requests), sum(each_n), max(each_n), requests[0].names, queue, limit)
        except QueueFull:
            if not (sheds and self._less_urgent(requests, queue.length + sum(each_n))):
                raise

    def _make_room(self, expected: Sequence[GenerationRequest]) -> None:
        """End less urgent requests, with QueueFull, as far as the queue is over its limit with those that are expected. Raises
        QueueFull if too few are left that could make way."""
        queue, limit = self._choices.queue, self._max_queued
        if limit is None or queue.length <= limit:
            return
        text, retry_after = (
            f"more urgent requests came, and the limit is {limit} (--max-queued-requests)",
            queue.seconds_to_empty(),
        )
        if not (shed := self._less_urgent(expected, queue.length)):
            raise QueueFull(text, retry_after)
        for generation in shed:
            generation.error = QueueFull(text, retry_after)
            generation.wake.set()
            self._drop([choice.key for choice in generation.open], "abort")

    def _less_urgent(self, requests: Sequence[GenerationRequest], length: int) -> list[Generation]:
        """Return who makes way for the requests where the queue would have this length; none if that were not enough."""
        sign = self.info.priority_sign
        least = sign * min(sign * request.params.priority for request in requests)
        return self._choices.less_urgent(least, sign, length - (self._max_queued or 0))

    def _send(self, generation: Generation, prompt: int, request: GenerationRequest) -> None:
        """Send all choices of the generation's request number `prompt`."""
        now, interval = time.perf_counter(), request.params.stream_interval or self._stream_interval
        choices, ends, adapter = [], extra_ends(self.tokenizer, self.info), self.adapters.number(request)
        for index in range(request.params.n):
            key, params = next(self._keys), engine_params(request.params, index, ends)
            self._transport.send(messages.Generate(key, request.prompt_ids, params, request.namespace, adapter))
            detokenizer = Detokenizer(self.tokenizer, request.prompt_ids, request.params, request.shown_tokens)
            choices.append(Choice(key, prompt, index, generation, request, detokenizer, interval, now))
        generation.open += choices
        self._choices.add(choices)

    def _drop(self, keys: Iterable[int], outcome: FinishType) -> None:
        """Abort those of the choices that the engine still runs, since nobody waits for them any more."""
        live = self._choices.drop(keys, outcome)
        if live and self.failure is None:
            self._transport.send(messages.Abort(live))

    async def flush_cache(self) -> int:
        """Drop every cached prefix that no request holds, and return how many pages became free."""
        return await self._ask(messages.FlushCache, int)

    async def profile(self, command: Callable[[int], Command]) -> ProfileStatus:
        """Start or stop a profile, or ask for its state. Raises Conflict if it cannot be done while one runs, or none;
        InvalidParameter for a folder that cannot be written."""
        return await self._ask(command, ProfileStatus)

    async def _ask[T: Answer](self, command: Callable[[int], Command], answer: type[T]) -> T:
        """Send a command, made for a new call's number, and return its answer. Raises Conflict or InvalidParameter."""
        self.check_ready()
        call = next(self._calls)
        self._transport.send(command(call))  # before the call is kept, since a command may be impossible to encode
        self._answers[call] = future = asyncio.get_running_loop().create_future()
        found = await future
        assert isinstance(found, answer)
        return found

    def _answer(self, call: int, answer: Answer | Exception) -> None:
        future = self._answers.pop(call, None)
        if future is None or future.done():  # its caller waits no more
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_event(self, event: Event) -> None:
        self._watchdog.see(event, self.stats)
        match event:
            case messages.StepOutput():
                self._choices.push(event)
                if event.stats is not None:
                    self.stats = event.stats
            case (
                messages.CacheFlushed(call=call, num_pages=num_pages)
                | messages.AdapterUnloaded(call=call, num_pages=num_pages)
            ):
                self._answer(call, num_pages)
            case messages.GrammarCompiled(call=call):
                self._answer(call, 0)
            case messages.StateChanged(call=call):
                self.trainer.see(event)
                self._answer(call, event)
            case messages.ProfileAnswer(call=call, status=status):
                self._answer(call, status)
            case messages.AdapterLoaded(call=call, adapter=adapter):
                self._answer(call, adapter)
            case messages.Refused(call=call, message=message, param=param):
                self._answer(call, InvalidParameter(param, message) if param else Conflict(message))
            case Starting():
                self.starting = event
            case messages.Ready(info=info):
                self._info = info
                self._adapters = AdapterTable(info, self._ask, self._lora_dir)
                self._settled.set()
            case messages.EngineDied(message=message):
                if self.failure is None:
                    self.failure = message
                    self._fail_all(EngineFailed(f"the engine died: {message}"))
                    self.failed.set()
                    self._settled.set()

    def _fail_all(self, error: Exception) -> None:
        self._choices.fail(error)
        for call in list(self._answers):
            self._answer(call, error)
