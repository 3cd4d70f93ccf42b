"""A device whose output can be computed by hand, for tests of everything above the runner. No jax.

The KV of a token is a number that depends on the token and on the KV of the token before it, and the next token is a
hash of the KV of the whole sequence; both are read through the page table that plans have built up. So a wrong page, a
stale one, a page with two owners, a missing load or a wrong order gives a wrong token. `continuation` says what is right.

Rows of width W are verified as a real device does: drafts are computed like known tokens, a token is sampled after each, and
drafts hold while they equal what was sampled. The drafter guesses right more often than not, so that rows of a batch advance
at different speeds.

Each data rank has pages of its own, under the same ids.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

import numpy as np

from sgl_jax.request import MAX_LOGPROBS, Request
from sgl_jax.step_plan import Flag, Param, StepPlan, StepTokens, TokenScores, row_capacity
from sgl_jax.testing.fake_tracer import FakeTracer

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """splitmix64's finaliser."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def kv_of(before: int, token: int) -> int:
    """The KV of a token after a token with KV `before`; 0 before the first."""
    return _mix((before * 3 + token + 1) & _MASK)


def kv_chain(tokens: Iterable[int]) -> list[int]:
    """The KV of each token of a sequence."""
    chain: list[int] = []
    for token in tokens:
        chain.append(kv_of(chain[-1] if chain else 0, token))
    return chain


def summary_of(kv: Sequence[int] | np.ndarray) -> int:
    """Summarise what a query sees of a sequence: every position counts, each with another weight."""
    values = np.asarray(kv, np.uint64)
    weights = 2 * np.arange(len(values), dtype=np.uint64) + np.uint64(1)
    return int((values * weights).sum(dtype=np.uint64))


def token_of(
    summary: int,
    position: int,
    vocab_size: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    output: Iterable[int] | None = None,
    held_back: frozenset[int] = frozenset(),
) -> int:
    """The token at `position`, given the summary of all before it.

    seed: u32, matters with a temperature. output: the tokens generated so far, in any order, for requests with
    penalties. held_back: tokens that cannot be sampled here.
    """
    x = summary
    if temperature > 0:
        x = _mix(x ^ _mix(seed ^ (position << 32)))
    if output is not None:
        x = _mix(x ^ (sum(map(_mix, output)) & _MASK))
    x = _mix(x)
    while x % vocab_size in held_back:
        x = _mix(x)
    return x % vocab_size


def logprob_of(kv: int, token: int) -> float:
    """The logprob of `token` after a token with this KV; a multiple of 1/8, exact in float32."""
    return -(_mix(kv ^ token) % 800 + 1) / 8


def continuation(request: Request, num_tokens: int, vocab_size: int) -> list[int]:
    """The right answer: num_tokens tokens after the request's prompt, stop tokens not looked at."""
    params = request.params
    kv = kv_chain(request.prompt.tolist())
    output: list[int] = []
    while len(output) < num_tokens:
        held_back = request.stop_token_ids.tolist() if len(output) < params.min_tokens else ()
        token = token_of(
            summary_of(kv),
            len(kv),
            vocab_size,
            temperature=params.temperature,
            seed=request.seed,
            output=output if params.has_penalties else None,
            held_back=frozenset(held_back),
        )
        output.append(token)
        kv.append(kv_of(kv[-1], token))
    return output


@dataclasses.dataclass(frozen=True)
class FakeFlight:
    """A step that was computed at its launch."""

    runner: FakeRunner
    plan: StepPlan
    number: int
    ready_at: float
    result: StepTokens

    def collect(self) -> StepTokens:
        return self.runner.collect(self)


@dataclasses.dataclass
class _Row:
    """Device state of a row."""

    page_table: np.ndarray
    rank: int = -1  # of the step before
    length: int = 0
    last_token: int = -1
    drafts: list[int] = dataclasses.field(default_factory=list)
    output: list[int] = dataclasses.field(default_factory=list)  # loaded and counted for rows with penalties
    held_back: frozenset[int] = frozenset()
    held_until: int = 0


class FakeRunner:
    """An engine.core.Runner. Steps compute at launch, as a device would in order; they are collected step_seconds later."""

    compiles_after_ready = 0

    def __init__(
        self,
        *,
        num_rows: int,
        num_pages: int,
        page_size: int,
        context_length: int,
        vocab_size: int = 512,
        step_seconds: float = 0.0,
        num_ranks: int = 1,
        width: int = 1,
    ):
        """`num_rows` counts the rows of all data ranks, `num_pages` the pages of each, its scratch page included; `width` is W
        of the widest step."""
        pages_per_row = -(-row_capacity(context_length, width) // page_size)
        self.page_size, self.vocab_size, self.step_seconds = page_size, vocab_size, step_seconds
        self.tracer = FakeTracer()
        self.plans: list[StepPlan] = []  # everything launched, for tests to read
        self._kv: list[int] = [0] * (num_ranks * num_pages * page_size)
        self._num_collected = 0
        self._num_pages, self._num_ranks, self._width = num_pages, num_ranks, width
        self._rows = [_Row(np.zeros(pages_per_row, np.int32)) for _ in range(num_rows)]

    def launch(self, plan: StepPlan) -> FakeFlight:
        self._check(plan)
        for load in plan.loads:
            row = self._rows[load.row]
            if load.pages is not None:
                row.page_table[:] = 0
                row.page_table[: len(load.pages)] = load.pages
            if load.request is not None:
                self._load_state(row, load.request)
        for r, index, page in plan.page_updates.T:
            assert 0 < page < self._num_pages, f"page {page} of {self._num_pages}"
            self._rows[r].page_table[index] = page
        result = self._run(plan)
        self.plans.append(plan)
        return FakeFlight(self, plan, len(self.plans), time.monotonic() + self.step_seconds, result)

    def collect(self, flight: FakeFlight) -> StepTokens:
        self._num_collected += 1
        assert flight.number == self._num_collected, "steps are collected in the order of their launch"
        time.sleep(max(0.0, flight.ready_at - time.monotonic()))
        return flight.result

    def _check(self, plan: StepPlan) -> None:
        """The promises of a StepPlan."""
        assert len(plan.rows) > 0
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row is in the plan twice"
        assert (plan.num_new >= 1).all()
        assert (np.diff(plan.rank) >= 0).all(), "rows come by rank"
        first, last = plan.rank[0], plan.rank[-1]
        assert 0 <= first <= last < self._num_ranks, f"ranks {first} to {last} of {self._num_ranks}"
        assert plan.num_short.shape == (self._num_ranks,), "num_short is one number a rank"
        for rank, num_short in enumerate(plan.num_short):
            is_short = plan.num_new[plan.rank == rank] <= plan.width
            assert num_short == is_short.sum(), f"rank {rank} has {is_short.sum()} short rows"
            assert is_short[:num_short].all(), "short rows come first in their rank"
            decodes = plan.from_device[plan.rank == rank]
            assert decodes[: decodes.sum()].all(), "rows that decode come first in their rank"
        for row, rank, from_device in zip(plan.rows, plan.rank, plan.from_device, strict=True):
            assert self._rows[row].rank == rank or not from_device, "a row that decodes moved to another rank"
            self._rows[row].rank = int(rank)
        assert plan.num_tokens == plan.num_new.sum()
        assert (plan.num_new[plan.from_device] == plan.width).all()
        for row, start in zip(plan.rows[plan.from_device], plan.start[plan.from_device], strict=True):
            length = self._rows[row].length
            assert length <= start <= length + 2 * (self._width - 1), f"row {row} has {length} tokens, start is {start}"
        fields = (plan.rows, plan.rank, plan.start, plan.num_new, plan.num_short, plan.next_token, plan.tokens)
        assert {x.dtype for x in (*fields, plan.params, plan.page_updates)} == {np.dtype(np.int32)}

    def _load_state(self, row: _Row, request: Request) -> None:
        row.output = request.tokens[len(request.prompt) :].tolist()
        row.held_back = frozenset(request.stop_token_ids.tolist())
        row.held_until = len(request.prompt) + request.params.min_tokens

    def _run(self, plan: StepPlan) -> StepTokens:
        num_rows, width = len(plan.rows), plan.width
        first = (np.cumsum(plan.num_new) - plan.num_new).tolist()
        # Every row reads its inputs before any writes its KV: a page with two owners in one step must not go unseen.
        places = [self._places(i, plan) for i in range(num_rows)]
        written = [p for (own, start) in places for p in own[start:]]
        assert len(set(written)) == len(written), "two rows write to one place"
        read = {p for (own, start) in places for p in own[:start]}
        assert not read.intersection(written), "a row reads a place that another writes"
        kv_of_token = [0] * plan.num_tokens
        for i, (own, start) in enumerate(places):
            before = self._kv[own[start - 1]] if start else 0
            for j, token in enumerate(self._tokens(i, plan, first[i])):
                before = self._kv[own[start + j]] = kv_of_token[first[i] + j] = kv_of(before, token)
        sampled, accepted = np.zeros((num_rows, width), np.int32), np.ones(num_rows, np.int32)
        kv_of_line = [[0] * width for _ in range(num_rows)]  # the KV of the token after which each was sampled
        for i, (own, start) in enumerate(places):
            row, kv = self._rows[plan.rows[i]], [self._kv[p] for p in own]
            if plan.from_device[i]:
                tokens = self._verify(row, plan.params[i], kv, start)
                sampled[i, : len(tokens)], accepted[i] = tokens, len(tokens)
                kv_of_line[i][: len(tokens)] = kv[start : start + len(tokens)]
                row.length = start + len(tokens)
            else:
                tokens = [self._sample(row, plan.params[i], kv, row.output)]
                sampled[i, 0], kv_of_line[i][0] = tokens[0], kv[-1]
                row.length = start + int(plan.num_new[i])
            if plan.samples[i]:
                row.last_token = tokens[-1]
                row.output += tokens
                row.drafts = self._draft(row, plan.params[i], [self._kv[p] for p in own[: row.length]])
        return StepTokens(sampled, accepted, *self._logprobs(plan, sampled, kv_of_line, kv_of_token))

    def _tokens(self, i: int, plan: StepPlan, first: int) -> list[int]:
        """The tokens that row i of the plan computes: those of the plan, or its last one and its drafts."""
        row, num_new = self._rows[plan.rows[i]], int(plan.num_new[i])
        if not plan.from_device[i]:
            return plan.tokens[first : first + num_new].tolist()
        assert row.last_token >= 0, "no last token on the device"
        return [row.last_token, *row.drafts[: num_new - 1]]

    def _places(self, i: int, plan: StepPlan) -> tuple[list[int], int]:
        """Where the KV of each of the row's tokens lies, this step's included, and how many are older."""
        start = self._rows[plan.rows[i]].length if plan.from_device[i] else int(plan.start[i])
        position = np.arange(start + int(plan.num_new[i]))
        pages = self._rows[plan.rows[i]].page_table[position // self.page_size]
        pages = pages + plan.rank[i] * self._num_pages
        return (pages * self.page_size + position % self.page_size).tolist(), start

    def _verify(self, row: _Row, params: np.ndarray, kv: list[int], start: int) -> list[int]:
        """The tokens that a row which decodes gains: sampled after each of its tokens, until one is not its draft."""
        tokens: list[int] = []
        for end in range(start + 1, len(kv) + 1):
            tokens.append(self._sample(row, params, kv[:end], [*row.output, *tokens]))
            if end == len(kv) or tokens[-1] != row.drafts[end - start - 1]:
                return tokens
        raise AssertionError("a row that decodes has a token")

    def _draft(self, row: _Row, params: np.ndarray, kv: list[int]) -> list[int]:
        """Guesses at what comes after the row's last token: right, but for one time in three."""
        drafts: list[int] = []
        for _ in range(self._width - 1):
            kv = [*kv, kv_of(kv[-1], [row.last_token, *drafts][-1])]
            right = self._sample(row, params, kv, [*row.output, *drafts])
            drafts.append(right if _mix(kv[-1]) % 3 else (right + 1) % self.vocab_size)
        return drafts

    def _sample(self, row: _Row, params: np.ndarray, kv: list[int], output: list[int]) -> int:
        flags = int(params[Param.FLAGS])
        held_back = row.held_back if flags & Flag.BIAS and len(kv) < row.held_until else frozenset[int]()
        return token_of(
            summary_of(kv),
            len(kv),
            self.vocab_size,
            temperature=float(params[Param.TEMPERATURE :].view(np.float32)[0]),
            seed=int(params[Param.SEED : Param.SEED + 1].view(np.uint32)[0]),
            output=output if flags & Flag.PENALTIES else None,
            held_back=held_back,
        )

    def _logprobs(
        self, plan: StepPlan, sampled: np.ndarray, kv_of_line: list[list[int]], kv: list[int]
    ) -> tuple[TokenScores | None, TokenScores | None]:
        last = np.cumsum(plan.num_new) - 1
        following = np.roll(plan.tokens, -1)
        following[last] = plan.next_token
        lines = [each for row in kv_of_line for each in row]
        rows = self._scored(lines, sampled.reshape(-1).tolist()) if plan.wants_logprobs else None
        tokens = self._scored(kv, following.tolist()) if plan.wants_prompt_logprobs else None
        return rows, tokens

    def _scored(self, kv: list[int], tokens: list[int]) -> TokenScores:
        """Best first are the tokens after the chosen one, at its logprob, its logprob - 1, …"""
        chosen = np.array([logprob_of(k, t) for k, t in zip(kv, tokens, strict=True)], np.float32)
        steps = np.arange(MAX_LOGPROBS)
        ids = (np.array(tokens)[:, None] + 1 + steps) % self.vocab_size
        return TokenScores(chosen, ids.astype(np.int32), (chosen[:, None] - steps).astype(np.float32))
