"""A batch driven on the device itself: no scheduler, no prefix cache, every step waited for.

prefill throughput  prompt tokens / time until every row's first token is on the host
decode latency      of one step, from the tokens before to its own tokens on the host
decode throughput   rows / decode latency
total throughput    prompt and output tokens / (prefill + all decode steps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.one_batch_arguments import Case
from sgl_jax.benchmark.roofline import MachineLimits, ModelCost, decode_bandwidth_share, matmul_share
from sgl_jax.engine.core import Runner
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.request import Request, SamplingParams
from sgl_jax.scheduler.rows import encode_params
from sgl_jax.step_plan import StepPlan


def check_fits(case: Case, info: EngineInfo) -> None:
    """Raises BenchmarkError with the limit that is in the way: the batch must run at once."""
    if case.batch_size > info.max_running_requests:
        raise BenchmarkError(
            f"--batch-size is {case.batch_size}; {info.max_running_requests} requests can run at once, "
            "raise --max-running-requests"
        )
    tokens = case.input_len + case.output_len
    if tokens > info.context_length:
        raise BenchmarkError(
            f"--input-len {case.input_len} and --output-len {case.output_len} make {tokens} tokens; a request may "
            f"hold {info.context_length}, raise --context-length if the model allows it"
        )
    pool = info.max_total_tokens // info.page_size
    if (pages := case.batch_size * _pages(tokens, info.page_size)) > pool:
        raise BenchmarkError(
            f"{case.batch_size} requests of {tokens} tokens need {pages} pages of {info.page_size} tokens; the KV "
            f"pool has {pool}, raise --max-total-tokens or --mem-fraction-static"
        )


@dataclass(frozen=True)
class BatchTimes:
    """Seconds. Formulas at the top of this file; None where there is no decode step."""

    case: Case
    prefill_s: float
    decode_s: list[float]  # each step

    @property
    def prefill_throughput(self) -> float:
        return self.case.batch_size * self.case.input_len / self.prefill_s

    @property
    def median_decode_s(self) -> float | None:
        return float(np.median(self.decode_s)) if self.decode_s else None

    @property
    def median_decode_throughput(self) -> float | None:
        return self.case.batch_size / step if (step := self.median_decode_s) else None

    @property
    def total_s(self) -> float:
        return self.prefill_s + sum(self.decode_s)

    @property
    def total_throughput(self) -> float:
        return self.case.batch_size * (self.case.input_len + self.case.output_len) / self.total_s

    def decode_bandwidth_share(self, cost: ModelCost, limits: MachineLimits) -> float | None:
        """Of the median step, with the KV of the mean one: the prompt and half of the output."""
        if (step := self.median_decode_s) is None:
            return None
        context = self.case.input_len + self.case.output_len / 2
        return decode_bandwidth_share(cost, limits, self.case.batch_size, context, step)

    def prefill_matmul_share(self, cost: ModelCost, limits: MachineLimits) -> float:
        return matmul_share(cost, limits, self.case.batch_size * self.case.input_len, self.prefill_s)


class DeviceBatch:
    """Greedy requests in rows of their own, computed together.

    Row r owns the pages [1 + r x n, 1 + (r + 1) x n), n being what the longest row needs; page 0 is the scratch page.
    """

    def __init__(self, runner: Runner, info: EngineInfo, prompts: Sequence[Sequence[int]], output_len: int):
        self._runner = runner
        self._page_size, self._chunk = info.page_size, info.chunked_prefill_size
        self._prompts = [np.array(prompt, np.int32) for prompt in prompts]
        self._prompt_len = np.array([len(prompt) for prompt in prompts], np.int32)
        self._computed = np.zeros(len(prompts), np.int32)
        self._pages_per_row = _pages(int(self._prompt_len.max()) + output_len, info.page_size)
        self._params = encode_params(_greedy(self._prompts[0], output_len))
        self._sampled: list[tuple[np.ndarray, np.ndarray]] = []  # of each step: rows, their tokens

    def prefill(self) -> None:
        """Compute the prompts; returns when the last step's tokens are here."""
        flights = [self._runner.launch(plan) for plan in self._prefill_plans()]
        for flight in flights:
            self._collect(flight)

    def decode(self) -> None:
        """One more token for every row."""
        rows = np.arange(len(self._prompts), dtype=np.int32)
        unknown = np.zeros_like(rows)  # the device has the tokens
        self._collect(self._runner.launch(self._plan(rows, np.ones_like(rows), unknown, np.full_like(rows, -1))))

    def outputs(self) -> list[list[int]]:
        """What was sampled, by row."""
        found: list[list[int]] = [[] for _ in self._prompts]
        for rows, tokens in self._sampled:
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                found[row].append(token)
        return found

    def _collect(self, flight) -> None:
        plan: StepPlan = flight.plan
        tokens = self._runner.collect(flight).tokens
        self._sampled.append((plan.rows[plan.samples], tokens[plan.samples]))

    def _prefill_plans(self) -> Iterator[StepPlan]:
        """Steps of as many prompt tokens as the engine takes, row after row."""
        while (missing := self._prompt_len - self._computed).any():
            before = np.cumsum(missing) - missing
            num_new = np.clip(self._chunk - before, 0, missing)
            rows = np.flatnonzero(num_new).astype(np.int32)
            rows = rows[np.argsort(num_new[rows] > 1, kind="stable")]  # single tokens first
            start, end = self._computed[rows], self._computed[rows] + num_new[rows]
            tokens = np.concatenate([self._prompts[r][s:e] for r, s, e in zip(rows, start, end, strict=True)])
            follows = [
                p[e] if e < len(p) else -1 for p, e in zip(map(self._prompts.__getitem__, rows), end, strict=True)
            ]
            yield self._plan(rows, num_new[rows].astype(np.int32), tokens, np.array(follows, np.int32))

    def _plan(self, rows: np.ndarray, num_new: np.ndarray, tokens: np.ndarray, next_token: np.ndarray) -> StepPlan:
        """The next tokens of these rows, which then count as computed."""
        start = self._computed[rows]
        end = self._computed[rows] = start + num_new
        return StepPlan(
            keys=rows.astype(np.int64),
            rows=rows,
            rank=np.zeros_like(rows),
            start=start,
            num_new=num_new,
            num_single=np.array([np.count_nonzero(num_new == 1)], np.int32),
            samples=end >= self._prompt_len[rows],
            from_device=start >= self._prompt_len[rows],
            next_token=next_token,
            tokens=tokens,
            params=np.tile(self._params, (len(rows), 1)),
            page_updates=self._page_updates(rows, _pages(start, self._page_size), _pages(end, self._page_size)),
            loads=[],
        )

    def _page_updates(self, rows: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Each row's pages number first to last: i32[3, U] (row, index, page)."""
        need = last - first
        row = np.repeat(rows, need)
        index = np.repeat(first - (np.cumsum(need) - need), need) + np.arange(len(row))
        return np.stack([row, index, 1 + row * self._pages_per_row + index]).astype(np.int32)


def time_batch(batch: DeviceBatch, case: Case, clock: Callable[[], float]) -> BatchTimes:
    """`clock` in seconds is read at the start, when the prefill's tokens have come, and after each decode step."""
    before = clock()
    batch.prefill()
    now = clock()
    prefill, decode = now - before, []
    for _ in range(case.output_len - 1):
        before = now
        batch.decode()
        now = clock()
        decode.append(now - before)
    return BatchTimes(case, prefill, decode)


def _pages[T: (int, np.ndarray)](tokens: T, page_size: int) -> T:
    return -(-tokens // page_size)


def _greedy(prompt: np.ndarray, output_len: int) -> Request:
    return Request(
        key=0,
        prompt=prompt,
        params=SamplingParams(temperature=0.0, ignore_eos=True),
        namespace="",
        seed=0,
        max_total_tokens=len(prompt) + output_len,
        stop_token_ids=np.empty(0, np.int32),
        arrival=0,
    )
