"""Fake device whose output can be computed by hand, for tests of everything above the runner. No jax.

The KV of a token is a number made of the token and the KV of the token before it, and the next token is a hash of the KV of
the whole sequence. Both are read through the page tables that the plans have built. So a wrong or stale page, a page with two
owners, a missing load or a wrong order gives a wrong token. `continuation` returns the right ones.

Rows of width W are verified as on a real device: drafts are computed like known tokens, a token is sampled after each, and a
draft is accepted if it equals the token sampled before it. Two of three drafts are right, so that rows advance at different
speeds. Each data rank has its own pages, under the same ids.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from fakes.fake_grammars import FakeMatcher, unpacked
from fakes.fake_tracer import FakeTracer
from fakes.hashing import MASK, mix
from sgl_jax.request import MAX_LOGPROBS, Request
from sgl_jax.step_plan import COLUMNS, Param, RowFlag, StepPlan, StepTokens, TokenScores, pages_per_row


def two_of_three(kv: int) -> bool:
    return mix(kv) % 3 > 0


def kv_of(before: int, token: int, adapter: int = 0) -> int:
    """Return the KV of a token that follows a token with KV `before` (0: none)."""
    return mix((before * 3 + token + 1 + (adapter << 32)) & MASK)


def kv_chain(tokens: Iterable[int], adapter: int = 0) -> list[int]:
    """Return the KV of each token of a sequence."""
    chain: list[int] = []
    for token in tokens:
        chain.append(kv_of(chain[-1] if chain else 0, token, adapter))
    return chain


def token_of(
    kv: Sequence[int],
    vocab_size: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    output: Iterable[int] | None = None,
    held_back: Collection[int] = (),
    allowed: Collection[int] | None = None,
) -> int:
    """Return the token that follows a sequence with this KV.

    `seed`: u32, used if there is a temperature. `output`: the tokens generated so far, in any order, for requests with
    penalties. `held_back`: tokens that cannot be sampled here. `allowed`: the only ones that a grammar allows, if the request
    has one; they are not held back if there are no others.
    """
    if allowed is not None:
        held_back = set(range(vocab_size)) - (set(allowed) - set(held_back) or set(allowed))
    weights = 2 * np.arange(len(kv), dtype=np.uint64) + np.uint64(1)  # so that the order of the sequence matters
    x = int((np.asarray(kv, np.uint64) * weights).sum(dtype=np.uint64))
    if temperature > 0:
        x = mix(x ^ mix(seed ^ (len(kv) << 32)))
    if output is not None:
        x = mix(x ^ (sum(map(mix, output)) & MASK))
    x = mix(x)
    while x % vocab_size in held_back:
        x = mix(x)
    return x % vocab_size


def state_of(kv: int) -> tuple[float, float]:
    """Return the hidden state of a token with this KV: small whole numbers, whose sums are exact in float32."""
    return float(kv % 251), float(kv % 241)


def logprob_of(kv: int, token: int) -> float:
    """Return the logprob of `token` after a token with this KV, a multiple of 1/8 and so exact in float32."""
    return -(mix(kv ^ token) % 800 + 1) / 8


def continuation(request: Request, num_tokens: int, vocab_size: int) -> list[int]:
    """Compute the right answer: num_tokens tokens after the request's prompt, regardless of stop tokens unless it has a grammar."""
    params, kv = request.params, kv_chain(request.prompt.tolist(), request.adapter)
    matcher = FakeMatcher(params.grammar.text, vocab_size) if params.grammar else None
    output: list[int] = []
    while len(output) < num_tokens:
        token = token_of(
            kv,
            vocab_size,
            temperature=params.temperature,
            seed=request.seed,
            output=output if params.has_penalties else None,
            held_back=request.stop_token_ids.tolist() if len(output) < params.min_tokens else (),
            allowed=matcher.allowed() if matcher else None,
        )
        output.append(token)
        if matcher and token in request.stop_token_ids:
            break
        if matcher:
            matcher.advance([token])
        kv.append(kv_of(kv[-1], token, request.adapter))
    return output


@dataclasses.dataclass(frozen=True)
class FakeFlight:
    """Launched step, computed already."""

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
    rank: int = -1  # its rank in the last step
    length: int = 0
    last_token: int = -1
    drafts: list[int] = dataclasses.field(default_factory=list)
    output: list[int] = dataclasses.field(default_factory=list)  # loaded, then counted, for rows with penalties
    held_back: list[int] = dataclasses.field(default_factory=list)  # stop tokens, until the length is held_until
    held_until: int = 0
    mask: np.ndarray | None = None


class FakeRunner:
    """The engine.core.Runner of the fake device. A step is computed at its launch, and done step_seconds later."""

    compiles_after_ready = num_compiling = 0

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
        lookahead: int = 0,
        draft_is_right: Callable[[int], bool] = two_of_three,
        pooling: str | None = None,
    ):
        """`num_rows`: rows of all data ranks together; `num_pages`: pages of each rank, its scratch page included; `width`: W
        of the widest step; `lookahead`: slots beyond a row's tokens that its drafts overwrite; `draft_is_right`: of the draft
        after a token with this KV; `pooling`: "last" or "mean", for steps that give states (`state_of`) and no tokens."""
        self._pooling = pooling
        self.page_size, self.vocab_size, self.step_seconds = page_size, vocab_size, step_seconds
        self.tracer = FakeTracer()
        self.plans: list[StepPlan] = []  # all that were launched, for tests to read
        self._kv: list[int] = [0] * (num_ranks * num_pages * page_size)
        self._num_collected = 0
        self._draft_is_right = draft_is_right
        self._num_pages, self._num_ranks, self._width = num_pages, num_ranks, width
        self._lookahead, num_pages_per_row = lookahead, pages_per_row(context_length, width, page_size, lookahead)
        self._slots_of_adapters: dict[int, int] = {0: 0}  # number of the load by Param.ADAPTER
        self._rows = [_Row(np.zeros(num_pages_per_row, np.int32)) for _ in range(num_rows)]
        self.is_whole = True  # nothing is released

    @property
    def weights(self) -> int:
        """Number of the model's weights, which is mixed into its KV as an adapter's is."""
        return self._slots_of_adapters[0]

    @weights.setter
    def weights(self, number: int) -> None:
        assert self._num_collected == len(self.plans), "a step is in flight"
        self._slots_of_adapters[0] = number

    def forget(self) -> None:
        """Lose all KV."""
        assert self._num_collected == len(self.plans), "a step is in flight"
        self._kv = [-1] * len(self._kv)

    def launch(self, plan: StepPlan) -> FakeFlight:
        """Compute a step. Raises AssertionError if the plan breaks a promise of StepPlan."""
        assert self.is_whole, "a step without its arrays"
        self._check(plan)
        for slot, source in plan.adapter_loads:
            self._slots_of_adapters[slot + 1] = int(source.partition(" ")[0])
        for load in plan.loads:
            row = self._rows[load.row]
            if load.pages is not None:
                row.page_table[:] = 0
                row.page_table[: len(load.pages)] = load.pages
            row.mask = row.mask if load.mask is None else load.mask
            if (request := load.request) is not None:
                row.output = request.tokens[len(request.prompt) :].tolist()
                row.held_back = request.stop_token_ids.tolist()
                row.held_until = len(request.prompt) + request.params.min_tokens
        for r, index, page in plan.page_updates.T:
            assert 0 < page < self._num_pages, f"page {page} of {self._num_pages}"
            self._rows[r].page_table[index] = page
        result = self._run(plan)
        self.plans.append(plan)
        return FakeFlight(self, plan, len(self.plans), time.monotonic() + self.step_seconds, result)

    def can_launch(self, plan: StepPlan) -> bool:
        return True

    def close(self) -> None: ...

    def collect(self, flight: FakeFlight) -> StepTokens:
        self._num_collected += 1
        assert flight.number == self._num_collected, "steps are collected in the order of their launch"
        time.sleep(max(0.0, flight.ready_at - time.monotonic()))
        return flight.result

    def _check(self, plan: StepPlan) -> None:
        """Raise AssertionError unless the plan keeps the promises of StepPlan."""
        assert len(plan.rows) > 0
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row is in the plan twice"
        assert (plan.num_new >= 1).all()
        assert (np.diff(plan.rank) >= 0).all(), "rows come by rank"
        first, last = plan.rank[0], plan.rank[-1]
        assert 0 <= first <= last < self._num_ranks, f"ranks {first} to {last} of {self._num_ranks}"
        assert plan.num_short.shape == (self._num_ranks,), "num_short is one number a rank"
        is_short = plan.num_new <= plan.width
        for rank, num_short in enumerate(np.bincount(plan.rank[is_short], minlength=self._num_ranks)):
            assert plan.num_short[rank] == num_short, f"rank {rank} has {num_short} short rows"
        order = 3 * plan.rank + np.where(plan.from_device, 0, np.where(is_short, 1, 2))
        assert (np.diff(order) >= 0).all(), "short rows come first in their rank, decoding ones before others"
        for row, rank, start, decodes in zip(plan.rows, plan.rank, plan.start, plan.from_device, strict=True):
            state = self._rows[row]
            assert state.rank == rank or not decodes, "a row that decodes moved to another rank"
            most = state.length + 2 * (self._width - 1)
            assert not decodes or state.length <= start <= most, (
                f"row {row} has {state.length} tokens, start is {start}"
            )
            state.rank = int(rank)
        assert plan.num_tokens == plan.num_new.sum()
        assert (plan.num_new[plan.from_device] == plan.width).all()
        for name, column in COLUMNS.items():
            assert getattr(plan, name).dtype == (np.bool_ if column.is_bool else np.int32), f"the dtype of {name}"
        assert plan.rank.dtype == np.int32

    def _run(self, plan: StepPlan) -> StepTokens:
        first = (np.cumsum(plan.num_new) - plan.num_new).tolist()
        slots = [self._slots(plan, i) for i in range(len(plan.rows))]
        # Rows are computed one after the other, so a slot that two of them use must be found here.
        written = [slot for own, start in slots for slot in own[start:]]
        assert len(set(written)) == len(written), "two rows write to one place"
        read = {slot for own, start in slots for slot in own[:start]}
        assert not read.intersection(written), "a row reads a place that another writes"
        sampled, accepted = np.zeros((len(slots), plan.width), np.int32), np.ones(len(slots), np.int32)
        kv_of_token: list[int] = []  # the KV of each packed token
        kv_of_line: list[int] = []  # the KV of the token after which each line was sampled
        for i, (own, start) in enumerate(slots):
            row, params, decodes = self._rows[plan.rows[i]], plan.params[i], plan.from_device[i]
            kv = [self._kv[slot] for slot in own[:start]]
            for slot, token in zip(own[start:], self._tokens(plan, i, first[i]), strict=True):
                self._kv[slot] = kv_of(kv[-1] if kv else 0, token, self._slots_of_adapters[params[Param.ADAPTER]])
                kv.append(self._kv[slot])
            kv_of_token += kv[start:]
            num_read = start + 1 if decodes else len(kv)  # the tokens before the first sampled one
            tokens = self._gain(row, params, kv, num_read)
            sampled[i, : len(tokens)], accepted[i] = tokens, len(tokens)
            kv_of_line += [*kv[num_read - 1 :], *[0] * plan.width][: plan.width]
            row.length = start + len(tokens) if decodes else len(kv)
            if plan.samples[i]:
                row.last_token = tokens[-1]
                row.output += tokens
                row.drafts = self._draft(row, params, kv[: row.length])
        self._write_ahead(plan)
        logprobs = self._scored(kv_of_line, sampled.reshape(-1)) if plan.wants_logprobs else None
        following = np.roll(plan.tokens, -1)
        following[np.cumsum(plan.num_new) - 1] = plan.next_token
        prompt_logprobs = self._scored(kv_of_token, following) if plan.wants_prompt_logprobs else None
        declines = plan.params[:, Param.FLAGS] & RowFlag.NO_DRAFTS > 0
        drafted = np.where(plan.from_device & ~declines, plan.width - 1, 0)
        hidden = self._pooled(plan, kv_of_token) if self._pooling else None
        return StepTokens(sampled, accepted, drafted, logprobs, prompt_logprobs, hidden)

    def _pooled(self, plan: StepPlan, kv_of_token: list[int]) -> np.ndarray | None:
        """Pool the states of each row's new tokens; None where nobody needs them."""
        if self._pooling == "last" and not plan.samples.any():
            return None
        states = np.array([*map(state_of, kv_of_token)], np.float32)
        ends = np.cumsum(plan.num_new)
        if self._pooling == "last":
            return states[ends - 1]
        return np.stack([states[end - n : end].sum(0) for end, n in zip(ends, plan.num_new, strict=True)])

    def _slots(self, plan: StepPlan, i: int) -> tuple[list[int], int]:
        """Return the slots of row i's tokens in the pool, with this step's tokens, and the number of earlier tokens."""
        row = self._rows[plan.rows[i]]
        start = row.length if plan.from_device[i] else int(plan.start[i])
        position = np.arange(start + int(plan.num_new[i]))
        pages = row.page_table[position // self.page_size] + plan.rank[i] * self._num_pages
        return (pages * self.page_size + position % self.page_size).tolist(), start

    def _write_ahead(self, plan: StepPlan) -> None:
        """Overwrite the slots behind each row's tokens, as a draft model does."""
        for number, rank in zip(plan.rows, plan.rank, strict=True):
            row = self._rows[number]
            for position in range(row.length, row.length + self._lookahead):
                page = int(row.page_table[position // self.page_size])
                assert page > 0, f"row {number} drafts without a page"
                self._kv[(page + rank * self._num_pages) * self.page_size + position % self.page_size] = -1

    def _tokens(self, plan: StepPlan, i: int, first: int) -> list[int]:
        """Return the tokens that row i computes: its tokens in the plan, or its last token and its drafts."""
        row, num_new = self._rows[plan.rows[i]], int(plan.num_new[i])
        if not plan.from_device[i]:
            return plan.tokens[first : first + num_new].tolist()
        assert row.last_token >= 0, "no last token on the device"
        return [row.last_token, *row.drafts[: num_new - 1]]

    def _gain(self, row: _Row, params: np.ndarray, kv: list[int], num_read: int) -> list[int]:
        """Sample after the first num_read tokens, and then after each draft that equals the token sampled before it."""
        tokens = [self._sample(row, params, kv[:num_read], row.output)]
        if params[Param.FLAGS] & RowFlag.NO_DRAFTS:
            return tokens
        for end in range(num_read + 1, len(kv) + 1):
            if tokens[-1] != row.drafts[len(tokens) - 1]:
                break
            tokens.append(self._sample(row, params, kv[:end], [*row.output, *tokens]))
        return tokens

    def _draft(self, row: _Row, params: np.ndarray, kv: list[int]) -> list[int]:
        """Guess the tokens that follow the row's last one."""
        drafts: list[int] = []
        for _ in range(self._width - 1):
            adapter = self._slots_of_adapters[params[Param.ADAPTER]]
            kv = [*kv, kv_of(kv[-1], [row.last_token, *drafts][-1], adapter)]
            right = self._sample(row, params, kv, [*row.output, *drafts])
            drafts.append(right if self._draft_is_right(kv[-1]) else (right + 1) % self.vocab_size)
        return drafts

    def _sample(self, row: _Row, params: np.ndarray, kv: list[int], output: list[int]) -> int:
        flags = int(params[Param.FLAGS])
        return token_of(
            kv,
            self.vocab_size,
            temperature=float(params[Param.TEMPERATURE :].view(np.float32)[0]),
            seed=int(params[Param.SEED : Param.SEED + 1].view(np.uint32)[0]),
            output=output if flags & RowFlag.PENALTIES else None,
            held_back=row.held_back if flags & RowFlag.BIAS and len(kv) < row.held_until else (),
            allowed=unpacked(row.mask) if flags & RowFlag.GRAMMAR and row.mask is not None else None,
        )

    def _scored(self, kv: list[int], tokens: np.ndarray) -> TokenScores:
        """Score tokens. The best ones are the ids after the chosen one, at its logprob, its logprob - 1, …"""
        chosen = np.array([logprob_of(k, t) for k, t in zip(kv, tokens.tolist(), strict=True)], np.float32)
        steps = np.arange(MAX_LOGPROBS)
        ids = (tokens[:, None] + 1 + steps) % self.vocab_size
        return TokenScores(chosen, ids.astype(np.int32), (chosen[:, None] - steps).astype(np.float32))
