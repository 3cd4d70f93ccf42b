"""One batch of prompts sent as one streaming request, and what its times come to.

    ttft               from sending until every row of the batch has its first token: the prefill of the whole batch
    latency            from sending to the end of the answer
    itl                (latency - ttft) / (output_len - 1)
    input throughput   prompt tokens / ttft
    output throughput  batch_size x output_len / (latency - ttft)

Nothing follows the first token when output_len is 1: itl and output throughput are None then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from sgl_jax.benchmark.client import Client, ServerError
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.one_batch_arguments import Case
from sgl_jax.benchmark.protocols import COMPLETIONS, NATIVE
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost, decode_bandwidth_share, matmul_share


@dataclass(frozen=True)
class BatchOptions:
    api_type: str = "native"  # or "openai"
    model: str | None = None  # OpenAI's API names it
    temperature: float = 0.0
    return_logprob: bool = False


@dataclass(frozen=True)
class BatchResult:
    """Times in seconds, throughputs in tokens per second; formulas at the top of this file."""

    case: Case
    input_tokens: int  # of the whole batch
    cached_tokens: int | None  # of them, found in the server's prefix cache; None: the server does not tell
    ttft_s: float
    latency_s: float

    @property
    def itl_s(self) -> float | None:
        return (self.latency_s - self.ttft_s) / (self.case.output_len - 1) if self.case.output_len > 1 else None

    @property
    def input_throughput(self) -> float:
        return self.input_tokens / self.ttft_s

    @property
    def output_throughput(self) -> float | None:
        if self.case.output_len == 1 or self.latency_s <= self.ttft_s:
            return None
        return self.case.batch_size * self.case.output_len / (self.latency_s - self.ttft_s)

    @property
    def overall_throughput(self) -> float:
        return (self.input_tokens + self.case.batch_size * self.case.output_len) / self.latency_s

    def decode_bandwidth_share(self, cost: ModelCost, limits: MachineLimits) -> float | None:
        """Of the decode steps, all rows in each; a row's context is its prompt and half of its output."""
        if not self.itl_s or not limits.memory_gb_per_s:
            return None
        context = self.input_tokens / self.case.batch_size + self.case.output_len / 2
        return decode_bandwidth_share(cost, limits, self.case.batch_size, context, self.itl_s)

    def prefill_matmul_share(self, cost: ModelCost, limits: MachineLimits) -> float | None:
        """Of the time until the last row's first token; cached tokens are not computed."""
        if not limits.matmul_tflop_per_s:
            return None
        return matmul_share(cost, limits, self.input_tokens - (self.cached_tokens or 0), self.ttft_s)


async def run_case(client: Client, case: Case, prompts: Sequence[Sequence[int]], options: BatchOptions) -> BatchResult:
    """Raises ServerError when the request fails, and BenchmarkError when a row does not get all its tokens."""
    path, body, rows = _request(case, prompts, options)
    data = msgspec.json.encode(body)  # before the clock runs
    now = asyncio.get_running_loop().time
    start, ttft = now(), None
    try:
        async with aclosing(client.events(path, data)) as events:
            async for event in events:
                rows.read(event)
                if ttft is None and not rows.waiting:
                    ttft = now() - start
    except (AttributeError, LookupError, TypeError) as error:
        raise ServerError(f"the answer is not one of {path}: {type(error).__name__}: {error}") from error
    latency = now() - start
    wanted = case.batch_size * case.output_len
    if ttft is None or rows.output_tokens not in (None, wanted):
        raise BenchmarkError(f"the answer has {rows.output_tokens or 0} of {wanted} tokens")
    return BatchResult(case, sum(map(len, prompts)), rows.cached_tokens, ttft, latency)


def _request(
    case: Case, prompts: Sequence[Sequence[int]], options: BatchOptions
) -> tuple[str, dict[str, Any], _NativeRows | _OpenAIRows]:
    """The path, the body, and what reads the events of the answer."""
    body: dict[str, Any] = {"stream": True}
    if options.api_type == "native":
        params = {"temperature": options.temperature, "max_new_tokens": case.output_len, "ignore_eos": True}
        body |= {"input_ids": prompts, "sampling_params": params}
        if options.return_logprob:
            body["return_logprob"] = True
        return NATIVE.path, body, _NativeRows(case.batch_size)
    body |= {"prompt": prompts, "max_tokens": case.output_len, "temperature": options.temperature}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    if options.model is not None:
        body["model"] = options.model
    if options.return_logprob:
        body["logprobs"] = 1
    return COMPLETIONS.path, body, _OpenAIRows(case.batch_size)


class _NativeRows:
    """What /generate has said of each row: every event repeats the row's token count."""

    def __init__(self, batch_size: int):
        self.waiting = set(range(batch_size))  # for their first token
        self._output = [0] * batch_size
        self._cached: dict[int, int] = {}

    def read(self, event: Mapping[str, Any]) -> None:
        row, meta = event.get("index", 0), event["meta_info"]
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            raise ServerError(f"the server aborted row {row}: {finish.get('message') or 'no reason given'}")
        self._output[row] = meta["completion_tokens"]
        if self._output[row]:
            self.waiting.discard(row)
        if "cached_tokens" in meta:
            self._cached[row] = meta["cached_tokens"]

    @property
    def output_tokens(self) -> int:
        return sum(self._output)

    @property
    def cached_tokens(self) -> int | None:
        return sum(self._cached.values()) if self._cached else None


class _OpenAIRows:
    """What /v1/completions has said: text by row, and the batch's tokens at the end.

    A row's first token is its first text. A token without text, a part of a character, shows with the next one.
    """

    def __init__(self, batch_size: int):
        self.waiting = set(range(batch_size))
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None

    def read(self, event: Mapping[str, Any]) -> None:
        for choice in event.get("choices") or ():
            if choice.get("finish_reason") in ("abort", "error"):
                raise ServerError(f"the server aborted row {choice['index']}")
            if choice.get("text") or choice.get("finish_reason"):
                self.waiting.discard(choice["index"])
        if usage := event.get("usage"):
            self.output_tokens = usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
