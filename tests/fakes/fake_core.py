"""Fake engine core without a model: the output of a request is its own prompt, once, and then eos.

A request with max_tokens 0 ends after its first step without output; in a pooling launch with the vector of `fake_vector`.
An adapter is loaded from any path but one that ends in "broken", and unloaded when no request uses it. A request with
adapter number a gets its prompt with 100 a added to each token.
Calls of a trainer change nothing; weights can be read from any path but one that ends in "broken".
A grammar changes nothing; one whose text has the word "bad" is refused.
A bias of 100 makes its token the output. Otherwise
output token k is `prompt[k % len(prompt)]`. Token number `len(prompt)` is eos, unless eos is ignored or min_tokens forbids
it. The logprob of output token k is -(k + 1) / 8, and of prompt token i -i / 8. The best tokens at a position are the token
itself and the ids after it, each 1 less likely.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fakes.fake_tracer import FakeTracer
from sgl_jax.engine import messages
from sgl_jax.engine.profiling import Profiler
from sgl_jax.request import FinishReason


def fake_info(
    vocab_size: int = 512,
    context_length: int = 512,
    eos_token_id: int = 2,
    adapters: Sequence[str] = (),
    max_lora_rank: int = 0,
    priority_sign: Literal[-1, 0, 1] = 0,
    pooling: messages.PoolingInfo | None = None,
) -> messages.EngineInfo:
    """`adapters` are names, for the numbers from 1 on."""
    return messages.EngineInfo(
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
        adapters=[messages.AdapterInfo(i, name, f"/{name}", 8, 4) for i, name in enumerate(adapters, 1)],
        max_lora_rank=max_lora_rank or 16 * bool(adapters),
        takes_grammars=True,
        priority_sign=priority_sign,
        pooling=pooling,
    )


def fake_vector(prompt_ids: Sequence[int], size: int) -> list[float]:
    """Return the vector of a prompt: multiples of 1/8 between -1 and 1, and so exact in float32."""
    return [(sum(prompt_ids) + 3 * i) % 17 / 8 - 1 for i in range(size)]


@dataclass
class _Row:
    request: messages.Generate
    produced: int = 0  # output tokens


class FakeCore:
    """Runs all requests at once. A step gives each one token and takes `step_seconds`."""

    def __init__(self, info: messages.EngineInfo | None = None, step_seconds: float = 0.0):
        self.info = info or fake_info()
        self.step_seconds = step_seconds
        self.commands: list[messages.Command] = []  # all that were handled, for tests to read
        self.tracer = FakeTracer()
        self._profiler = Profiler(self.tracer)
        self._rows: dict[int, _Row] = {}
        self._kept: list[messages.Event] = []
        self._num_adapters = len(self.info.adapters)
        self._unloading: list[messages.UnloadAdapter] = []
        self._seen_prompts: set[tuple[str, int, tuple[int, ...]]] = set()
        self._totals = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "steps": 0}

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._kept or self._unloading or self._profiler.writing)

    def handle(self, command: messages.Command) -> None:
        self.commands.append(command)
        match command:
            case messages.Generate(key=key):
                self._rows[key] = _Row(command)
            case messages.Abort(keys=keys):
                live = [key for key in keys if self._rows.pop(key, None)]
                finished = [messages.Finished(key, FinishReason("abort")) for key in live]
                self._kept.append(messages.StepOutput(finished=finished))
            case messages.FlushCache(call=call):
                self._kept.append(messages.CacheFlushed(call, len(self._seen_prompts)))
                self._seen_prompts.clear()
            case messages.LoadAdapter(call=call, name=name, path=path, pinned=pinned):
                self._kept.append(self._loaded(call, name, path, pinned))
            case messages.UnloadAdapter():
                self._unloading.append(command)
            case messages.CompileGrammar(call=call, kind=kind, text=text):
                bad = messages.Refused(call, f"it is bad: {text}", kind)
                self._kept.append(bad if "bad" in text else messages.GrammarCompiled(call))
            case messages.UpdateWeights(call=call, path=path) if path.endswith("broken"):
                self._kept.append(messages.Refused(call, f"{path} is broken", "model_path"))
            case messages.UpdateWeights(call=call, path=path, version=version):
                self._kept.append(messages.StateChanged(call, "done", weights=(path, version)))
            case (
                messages.PauseGeneration(call=call)
                | messages.ContinueGeneration(call=call)
                | messages.ReleaseMemory(call=call)
                | messages.ResumeMemory(call=call)
            ):
                self._kept.append(messages.StateChanged(call, "done"))
            case messages.StartProfile() | messages.StopProfile() | messages.GetProfile():
                answer = self._profiler.handle(command)
                self._kept += [answer] if answer else []
            case messages.Shutdown():
                raise AssertionError("the loop handles Shutdown")

    def step(self) -> list[messages.Event]:
        events, self._kept = [*self._kept, *self._unloaded(), *self._profiler.poll()], []
        if not self._rows:
            return events
        time.sleep(self.step_seconds)
        prompts = [self._prefill(row.request) for row in self._rows.values() if row.produced == 0]
        keys, tokens, finished, logprobs, pooled = [], [], [], {}, []
        for key in [key for key, row in self._rows.items() if row.request.params.max_tokens == 0]:
            if (pooling := self.info.pooling) is not None:
                vector = fake_vector(self._rows[key].request.prompt_ids, pooling.size)
                pooled.append(messages.Pooled(key, np.array(vector, "<f4").tobytes()))
            finished.append(messages.Finished(key, FinishReason("length")))
            del self._rows[key]
        keys += self._rows
        for i, key in enumerate(keys):
            row = self._rows[key]
            tokens.append(self._next_token(row))
            if (k := row.request.params.logprobs) is not None:
                logprobs[i] = self._scored(tokens[i], -(row.produced + 1) / 8, k)
            row.produced += 1
            if (reason := self._reason(row, tokens[i])) is not None:
                finished.append(messages.Finished(key, reason))
                del self._rows[key]
        self._totals["generated_tokens"] += len(keys)
        self._totals["steps"] += 1
        self._profiler.launched()
        self._profiler.collected()
        return [*events, messages.StepOutput(keys, tokens, finished, prompts, logprobs, self._stats(), pooled=pooled)]

    def close(self, reason: str = "") -> None:
        self._profiler.close()

    def _loaded(self, call: int, name: str, path: str, pinned: bool) -> messages.Event:
        if path.endswith("broken"):
            return messages.Refused(call, f"{path}: adapter_config.json is missing", "lora_path")
        self._num_adapters += 1
        return messages.AdapterLoaded(call, messages.AdapterInfo(self._num_adapters, name, path, 8, 4, pinned))

    def _unloaded(self) -> list[messages.Event]:
        used = {row.request.adapter for row in self._rows.values()}
        done = [each for each in self._unloading if each.adapter not in used]
        self._unloading = [each for each in self._unloading if each.adapter in used]
        return [messages.AdapterUnloaded(each.call, each.adapter) for each in done]

    def _prefill(self, request: messages.Generate) -> messages.PromptScored:
        prompt = (request.namespace, request.adapter, tuple(request.prompt_ids))
        cached = len(request.prompt_ids) - 1 if prompt in self._seen_prompts else 0
        self._seen_prompts.add(prompt)
        self._totals["prompt_tokens"] += len(request.prompt_ids)
        self._totals["cached_tokens"] += cached
        scored = None
        if (k := request.params.prompt_logprobs) is not None:
            scored = [None, *(self._scored(t, -i / 8, k) for i, t in enumerate(request.prompt_ids) if i)]
        return messages.PromptScored(request.key, cached, scored)

    def _next_token(self, row: _Row) -> int:
        prompt, params = row.request.prompt_ids, row.request.params
        if forced := [token for token, bias in params.logit_bias.items() if bias == 100]:
            return forced[0]
        if row.produced == len(prompt) and row.produced >= params.min_tokens and not params.ignore_eos:
            return self.info.eos_token_ids[0]
        return (prompt[row.produced % len(prompt)] + 100 * row.request.adapter) % self.info.vocab_size

    def _scored(self, token: int, logprob: float, k: int) -> messages.TokenLogprobs:
        ids = [(token + j) % self.info.vocab_size for j in range(k)]
        return messages.TokenLogprobs(logprob, ids, [logprob - j for j in range(k)])

    def _reason(self, row: _Row, token: int) -> FinishReason | None:
        params = row.request.params
        if row.produced > params.min_tokens:
            is_eos = token in self.info.eos_token_ids and not params.ignore_eos
            if is_eos or token in params.stop_token_ids:
                return FinishReason("stop", token)
        room = self.info.context_length - len(row.request.prompt_ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        return FinishReason("length") if row.produced >= limit else None

    def _stats(self) -> messages.Stats:
        n, used = len(self._rows), sum(len(r.request.prompt_ids) + r.produced for r in self._rows.values())
        return messages.Stats(
            num_running=n, kv_usage=used / self.info.max_total_tokens, gen_throughput=float(n), **self._totals
        )
