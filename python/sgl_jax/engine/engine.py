"""In-process API: the engine core in a thread, and calls that need no server.

with sgl_jax.Engine(model_path="…") as engine:
    print(engine.generate("Once upon a time", {"max_new_tokens": 32})["text"])
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Self

from sgl_jax import __version__
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.engine.loop import EngineCore
from sgl_jax.engine.messages import (
    AdapterInfo,
    EngineInfo,
    GetProfile,
    MemoryTag,
    PauseMode,
    ProfileStatus,
    StartProfile,
    StateChanged,
    Stats,
    StopProfile,
    WeightsFormat,
)
from sgl_jax.engine.native_call import NativeCall, Reply, native_call
from sgl_jax.engine.native_encoding import native_encoding
from sgl_jax.engine.native_params import LogprobOptions, Params
from sgl_jax.engine.service import GenerationService
from sgl_jax.engine.transport import ThreadTransport
from sgl_jax.engine.watchdog import Watchdog
from sgl_jax.observability import log
from sgl_jax.settings.flags import Setting
from sgl_jax.settings.hub import refuse_no_model
from sgl_jax.settings.server_args import BY_NAME, SERVER, ServerArgs
from sgl_jax.settings.speculators import with_verifier
from sgl_jax.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Loads a model and generates. `server_args` are the flags of the server, in snake case."""

    def __init__(self, model_path: str | None = None, **server_args: Setting | list[str]):
        if model_path is None:
            raise TypeError("Engine needs model_path")
        given: dict[str, Any] = {"model_path": model_path, **server_args}
        args = ServerArgs(**given)  # checks types and values
        for name in server_args:
            if BY_NAME[name].about.group == SERVER and name != "stream_interval":
                raise TypeError(f"Engine has no HTTP server, so {name} would do nothing; leave it out")
        if args.compile_only:
            raise TypeError(
                "an Engine is there to generate; sgl_jax.planning.compile_command.compile_here(args) only compiles"
            )

        def build() -> EngineCore:
            from sgl_jax.engine.startup import build_core

            return build_core(args, behind=True)

        with log.heard():
            logger.info("sgl_jax %s, starting", __version__)
            args = with_verifier(args)
            refuse_no_model(args.model_path)
            tokenizer = load_tokenizer(args.tokenizer_path or args.model_path, args.chat_template, args.downloads)
            watchdog = Watchdog(args.soft_watchdog_timeout, args.watchdog_timeout)
            self.server_args = args
            limits = args.stream_interval, args.max_queued_requests, watchdog, args.lora_dir
            self._start(GenerationService(ThreadTransport(build), tokenizer, *limits))
            logger.info("Ready after %.1f s", self.info.start_seconds)

    def _start(self, service: GenerationService) -> None:
        self.tokenizer, self._service, self._closed = service.tokenizer, service, False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sgl-jax-api", daemon=True)
        self._thread.start()
        try:
            self._call(self._service.start())
            self._service.open()
        except BaseException:
            self._stop_loop()
            raise

    @property
    def info(self) -> EngineInfo:
        return self._service.info

    @property
    def stats(self) -> Stats:
        """Load and totals as the engine last reported them: several times a second, and when it falls idle."""
        return self._service.stats

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        return_text_in_logprobs: bool = False,
        rid: str | Sequence[str] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
    ) -> Reply | list[Reply] | Iterator[Reply]:
        """Return an answer for one prompt, a list for a list or n > 1; with `stream` an iterator of growing answers.

        Streamed answers of several prompts or choices carry their index in that list as "index".
        """
        options = LogprobOptions(return_logprob, top_logprobs_num, logprob_start_len, return_text_in_logprobs)
        given = prompt, input_ids, sampling_params, rid, options
        more = {"lora_path": lora_path, "text_field": "prompt"}
        call = native_call(self.tokenizer, self.info.context_length, *given, **more)
        return self._iterate(self._replies(call)) if stream else self._call(call.result(self._service))

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        return_logprob: bool = False,
        top_logprobs_num: int = 0,
        logprob_start_len: int = -1,
        return_text_in_logprobs: bool = False,
        rid: str | Sequence[str] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
    ) -> Reply | list[Reply] | AsyncIterator[Reply]:
        """Do as `generate` does, for asyncio and in any loop; with `stream` the awaited value is an async iterator."""
        options = LogprobOptions(return_logprob, top_logprobs_num, logprob_start_len, return_text_in_logprobs)
        given = prompt, input_ids, sampling_params, rid, options
        more = {"lora_path": lora_path, "text_field": "prompt"}
        call = native_call(self.tokenizer, self.info.context_length, *given, **more)
        if stream:
            return self._aiterate(self._replies(call))
        return await asyncio.wrap_future(self._submit(call.result(self._service)))

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        dimensions: int | None = None,
        rid: str | Sequence[str] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        priority: int = 0,
    ) -> Reply | list[Reply]:
        """Return the embedding of a prompt, or its logits and what follows from them; a list for a list
        (docs/features/embeddings.md). `dimensions`: so many values, from the first on."""
        given = prompt, input_ids, dimensions, rid, lora_path, priority
        call = native_encoding(self._service, *given, text_field="prompt")
        return self._call(call.result(self._service))

    async def async_encode(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        dimensions: int | None = None,
        rid: str | Sequence[str] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        priority: int = 0,
    ) -> Reply | list[Reply]:
        """Do as `encode` does, for asyncio and in any loop."""
        given = prompt, input_ids, dimensions, rid, lora_path, priority
        call = native_encoding(self._service, *given, text_field="prompt")
        return await asyncio.wrap_future(self._submit(call.result(self._service)))

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> AdapterInfo:
        """Read an adapter, from a folder or by its hub id, while requests run. Raises InvalidParameter or Conflict."""
        return self._call(self._service.adapters.load(lora_name, lora_path, pinned))

    def unload_lora_adapter(self, lora_name: str) -> int:
        """Forget an adapter when the requests that use it have ended, and return how many pages of KV became free.
        Raises UnknownAdapter or Conflict."""
        return self._call(self._service.adapters.unload(lora_name))

    def abort(self, rid: str) -> None:
        """End the request with this id; its finish reason is "abort"."""

        async def abort() -> int:
            return self._service.abort(rid)

        self._call(abort())

    def flush_cache(self) -> int:
        """Drop the cached prefixes that no request uses, and return how many pages became free."""
        return self._call(self._service.flush_cache())

    def pause_generation(self, mode: PauseMode = "abort") -> StateChanged:
        """Compute no further step until continue_generation. Requests end ("abort"), wait ("retract"), or keep their KV
        ("in_place")."""
        return self._call(self._service.trainer.pause(mode))

    def continue_generation(self) -> StateChanged:
        return self._call(self._service.trainer.go_on())

    def update_weights_from_disk(
        self,
        model_path: str,
        load_format: WeightsFormat = "auto",
        *,
        abort_all_requests: bool = False,
        flush_cache: bool = True,
        weight_version: str | None = None,
    ) -> StateChanged:
        """Read other weights of the same model while requests run, and use them from then on (docs/features/rl_hooks.md).
        Raises InvalidParameter for weights that do not fit, or Conflict."""
        more = {"abort_all_requests": abort_all_requests, "flush_cache": flush_cache}
        return self._call(self._service.trainer.update(model_path, load_format, **more, weight_version=weight_version))

    def release_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> StateChanged:
        """Give back the devices' memory of "kv_cache" and "weights", or of one. Raises Conflict while requests run."""
        return self._call(self._service.trainer.release(tags))

    def resume_memory_occupation(self, tags: Sequence[MemoryTag] | None = None) -> StateChanged:
        """Take the memory again, with the same weights or those read since, and an empty cache."""
        return self._call(self._service.trainer.resume(tags))

    def start_profile(
        self,
        output_dir: str | None = None,
        num_steps: int | None = None,
        *,
        host_tracer_level: int | None = None,
        python_tracer_level: int | None = None,
    ) -> ProfileStatus:
        """Record what engine and device do, until stop_profile or for num_steps steps (docs/features/profiling.md).

        Raises Conflict if a profile runs already, InvalidParameter for a folder that cannot be written.
        """
        levels = host_tracer_level, python_tracer_level
        return self._call(self._service.profile(lambda call: StartProfile(call, output_dir, num_steps, *levels)))

    def stop_profile(self) -> ProfileStatus:
        """End the profile; the status names its files. Raises Conflict if none runs."""
        return self._call(self._service.profile(StopProfile))

    def profile_status(self) -> ProfileStatus:
        """Return the state of the profile that runs, or of the last one."""
        return self._call(self._service.profile(GetProfile))

    def shutdown(self) -> None:
        """End the engine; running requests fail. May be called twice."""
        if self._closed:
            return
        self._call(self._service.close())
        self._closed = True
        self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit[T](self, work: Coroutine[object, None, T]) -> concurrent.futures.Future[T]:
        """Start the work in the loop that owns the service."""
        if self._closed:
            work.close()  # or Python warns that it was never awaited
            raise EngineFailed("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call[T](self, work: Coroutine[object, None, T]) -> T:
        return self._submit(work).result()

    async def _replies(self, call: NativeCall) -> AsyncIterator[Reply]:
        async for reply in call.stream(await self._service.submit(call.requests, stream=True)):
            yield reply

    def _iterate(self, answers: AsyncIterator[Reply]) -> Iterator[Reply]:
        found: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        future = self._pump(answers, found.put)
        try:
            while (answer := found.get()) is not None:
                yield answer
            future.result()
        finally:
            future.cancel()

    async def _aiterate(self, answers: AsyncIterator[Reply]) -> AsyncIterator[Reply]:
        found: asyncio.Queue[Reply | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(answer: Reply | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(found.put_nowait, answer)

        future = self._pump(answers, put)
        try:
            while (answer := await found.get()) is not None:
                yield answer
            future.result()
        finally:
            future.cancel()

    def _pump(
        self, answers: AsyncIterator[Reply], put: Callable[[Reply | None], None]
    ) -> concurrent.futures.Future[None]:
        """Start a stream: `put` is called in another thread with each answer, and with None at the end."""

        async def pump() -> None:
            async for answer in answers:
                put(answer)

        future = self._submit(pump())
        future.add_done_callback(lambda _: put(None))
        return future
