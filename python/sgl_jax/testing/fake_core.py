"""An engine core without a model: a request's output is its own prompt, once, and then eos.

Output token k is `prompt[k % len(prompt)]`; token number `len(prompt)` is eos unless it is ignored or min_tokens
forbids it. The logprob of output token k is -(k + 1) / 8, that of prompt token i is -i / 8, and the best tokens at a
position are the token itself and the ids after it, each 1 less likely.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sgl_jax.engine.messages import (
    Abort,
    CacheFlushed,
    Command,
    EngineInfo,
    Event,
    Finished,
    FlushCache,
    Generate,
    GetProfile,
    PromptScored,
    Shutdown,
    StartProfile,
    Stats,
    StepOutput,
    StopProfile,
    TokenLogprobs,
)
from sgl_jax.engine.profiling import Profiler
from sgl_jax.request import FinishReason
from sgl_jax.testing.fake_tracer import FakeTracer


def fake_info(vocab_size: int = 512, context_length: int = 512, eos_token_id: int = 2) -> EngineInfo:
    return EngineInfo(
        model_path="fake",
        architecture="FakeForCausalLM",
        dtype="float32",
        platform="cpu",
        device_kind="none",
        num_devices=1,
        vocab_size=vocab_size,
        context_length=context_length,
        eos_token_ids=[eos_token_id],
        page_size=16,
        max_total_tokens=16 * context_length,
        max_running_requests=64,
        chunked_prefill_size=context_length,
        num_programs=1,
        weight_bytes=0,
        kv_bytes_per_token=0,
        parameters_per_token=0,
        start_seconds=0.0,
    )


@dataclass
class _Row:
    request: Generate
    produced: int = 0
    cached: int = 0


class FakeCore:
    """Runs every request at once, one token per request and step; a step takes `step_seconds`."""

    def __init__(self, info: EngineInfo | None = None, step_seconds: float = 0.0):
        self.info = info or fake_info()
        self.step_seconds = step_seconds
        self.commands: list[Command] = []  # everything it was told, for tests to read
        self.tracer = FakeTracer()
        self._profiler = Profiler(self.tracer)
        self._rows: dict[int, _Row] = {}
        self._kept: list[Event] = []
        self._seen_prompts: set[tuple[str, tuple[int, ...]]] = set()
        self._totals = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "steps": 0}

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._kept)

    def handle(self, command: Command) -> None:
        self.commands.append(command)
        match command:
            case Generate(key=key):
                self._rows[key] = _Row(command)
            case Abort(keys=keys):
                live = [key for key in keys if self._rows.pop(key, None)]
                self._kept.append(StepOutput(finished=[Finished(key, FinishReason("abort")) for key in live]))
            case FlushCache(call=call):
                self._kept.append(CacheFlushed(call, len(self._seen_prompts)))
                self._seen_prompts.clear()
            case StartProfile() | StopProfile() | GetProfile():
                self._kept.append(self._profiler.handle(command))
            case Shutdown():
                raise AssertionError("the loop handles Shutdown")

    def step(self) -> list[Event]:
        events, self._kept = self._kept, []
        if not self._rows:
            return events
        if self.step_seconds:
            time.sleep(self.step_seconds)
        prompts = [self._prefill(row) for row in self._rows.values() if row.produced == 0]
        keys, tokens, finished, logprobs = list(self._rows), [], [], {}
        for i, (key, row) in enumerate(list(self._rows.items())):
            token = self._next_token(row)
            tokens.append(token)
            if row.request.params.logprobs is not None:
                logprobs[i] = self._scored(token, -(row.produced + 1) / 8, row.request.params.logprobs)
            row.produced += 1
            reason = self._reason(row, token)
            if reason is not None:
                finished.append(Finished(key, reason))
                del self._rows[key]
        self._totals["generated_tokens"] += len(keys)
        self._totals["steps"] += 1
        self._profiler.launched()
        self._profiler.collected()
        return [*events, StepOutput(keys, tokens, finished, prompts, logprobs, self._stats())]

    def close(self, reason: str = "") -> None:
        self._profiler.close()

    def _prefill(self, row: _Row) -> PromptScored:
        request = row.request
        prompt = (request.namespace, tuple(request.prompt_ids))
        if prompt in self._seen_prompts:
            row.cached = len(request.prompt_ids) - 1
        self._seen_prompts.add(prompt)
        self._totals["prompt_tokens"] += len(request.prompt_ids)
        self._totals["cached_tokens"] += row.cached
        k = request.params.prompt_logprobs
        scored = None
        if k is not None:
            scored = [None, *(self._scored(t, -i / 8, k) for i, t in enumerate(request.prompt_ids) if i)]
        return PromptScored(request.key, row.cached, scored)

    def _next_token(self, row: _Row) -> int:
        prompt, params = row.request.prompt_ids, row.request.params
        if row.produced == len(prompt) and row.produced >= params.min_tokens and not params.ignore_eos:
            return self.info.eos_token_ids[0]
        return prompt[row.produced % len(prompt)]

    def _scored(self, token: int, logprob: float, k: int) -> TokenLogprobs:
        return TokenLogprobs(
            logprob, [(token + j) % self.info.vocab_size for j in range(k)], [logprob - j for j in range(k)]
        )

    def _reason(self, row: _Row, token: int) -> FinishReason | None:
        params = row.request.params
        if row.produced > params.min_tokens:
            is_eos = token in self.info.eos_token_ids and not params.ignore_eos
            if is_eos or token in params.stop_token_ids:
                return FinishReason("stop", token)
        limit = self.info.context_length - len(row.request.prompt_ids)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        return FinishReason("length") if row.produced >= limit else None

    def _stats(self) -> Stats:
        pages = sum(len(r.request.prompt_ids) + r.produced for r in self._rows.values()) / self.info.max_total_tokens
        return Stats(num_running=len(self._rows), kv_usage=pages, gen_throughput=float(len(self._rows)), **self._totals)
