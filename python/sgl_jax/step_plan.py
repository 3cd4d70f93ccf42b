"""The plan of one step and its results: written by the scheduler, packed and run by the runtime.

A plan is a table of columns. Each column is declared once, in StepPlan; the vector that crosses to the device, what the
step program reads from it, the empty plan and the builder all derive from COLUMNS.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable
from typing import Annotated, NamedTuple, Protocol, get_type_hints

import numpy as np

from sgl_jax.request import Request


class Param(enum.IntEnum):
    """Columns of a row's sampling parameters, i32; the float ones hold the bits of a float32.

    A parameter of SamplingParams names its column; FLAGS alone belongs to none.
    """

    SEED = 0
    FLAGS = enum.auto()
    TOP_K = enum.auto()  # vocabulary size or more: off
    TEMPERATURE = enum.auto()  # float from here on; 0: greedy
    TOP_P = enum.auto()
    MIN_P = enum.auto()
    PRESENCE = enum.auto()
    FREQUENCY = enum.auto()
    REPETITION = enum.auto()


class Flag(enum.IntFlag):
    """Bits of Param.FLAGS: the parts of the sampler that a row needs."""

    LOGPROBS = 1
    PENALTIES = 2
    BIAS = 4  # logit_bias or min_tokens
    PROMPT_LOGPROBS = 8


class Per(enum.Enum):
    """Which things a column has a value for."""

    RANK = "rank"  # M of them
    ROW = "row"  # S
    TOKEN = "token"  # T
    UPDATE = "page update"  # U; the values lie along the last axis


def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)


def _numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def _minus_ones(n: int) -> np.ndarray:
    return np.full(n, -1, np.int32)


def _falses(n: int) -> np.ndarray:
    return np.zeros(n, np.bool_)


def _trues(n: int) -> np.ndarray:
    return np.ones(n, np.bool_)


def _no_params(n: int) -> np.ndarray:
    return np.zeros((n, len(Param)), np.int32)


def _no_updates(n: int) -> np.ndarray:
    return np.zeros((3, n), np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """How a column is packed: always as i32, padded with zeros, or with the state's spare row where it names rows."""

    per: Per
    default: Callable[[int], np.ndarray] = _zeros  # the column of so many things, for a plan built without it
    width: int = 1  # values per thing; 1: the array has no axis for them
    is_bool: bool = False
    names_rows: bool = False  # where the width is more than 1: the first value of each thing does


@dataclasses.dataclass(frozen=True, slots=True)
class RowLoad:
    """State a row gets before the step, besides what the plan's columns say: the uncommon part of an admission."""

    row: int
    pages: np.ndarray | None  # the row's whole page table so far (page ids of its rank), after a prefix hit
    request: Request | None  # given when its penalties, logit_bias or min_tokens need device state


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """S rows by data rank, ascending; within a rank those that decode come first, then others with at most W new tokens,
    then those with more. T new tokens in row order.

    A row that decodes computes its last token and W - 1 drafts. Only the device knows these tokens and how many of the
    drafts before were accepted, so for such a row `start` is an upper bound and its tokens are ignored.
    """

    keys: np.ndarray  # i64[S] request keys
    rank: np.ndarray  # i32[S] the data rank whose pages hold the row, 0 .. M-1
    width: int  # W
    loads: list[RowLoad]
    flags: Flag  # those of any row
    num_cached_tokens: int  # prompt tokens which the requests admitted by this plan found in the prefix cache
    num_short: Annotated[np.ndarray, Column(Per.RANK)]  # i32[M] rows of a rank, from its first on, with num_new <= W
    rows: Annotated[np.ndarray, Column(Per.ROW, _numbers, names_rows=True)]  # i32[S] lines of the state, over all ranks
    start: Annotated[np.ndarray, Column(Per.ROW)]  # i32[S] tokens computed before this step
    num_new: Annotated[np.ndarray, Column(Per.ROW)]  # i32[S] tokens computed by this step, >= 1
    # bool[S] the logits after the last new token are sampled; where from_device, those after each new token
    samples: Annotated[np.ndarray, Column(Per.ROW, _trues, is_bool=True)]
    # bool[S] the row decodes: its start and its W tokens are the device's
    from_device: Annotated[np.ndarray, Column(Per.ROW, _falses, is_bool=True)]
    next_token: Annotated[
        np.ndarray, Column(Per.ROW, _minus_ones)
    ]  # i32[S] the prompt token after the last new one, or -1
    params: Annotated[np.ndarray, Column(Per.ROW, _no_params, width=len(Param))]  # i32[S, len(Param)]
    tokens: Annotated[np.ndarray, Column(Per.TOKEN)]  # i32[T]
    # i32[3, U] (row, index in its page table, page id of the row's rank)
    page_updates: Annotated[np.ndarray, Column(Per.UPDATE, _no_updates, width=3, names_rows=True)]

    @classmethod
    def of(
        cls,
        num_new: np.ndarray,
        *,
        num_ranks: int = 1,
        width: int = 1,
        keys: np.ndarray | None = None,
        rank: np.ndarray | None = None,
        loads: Iterable[RowLoad] = (),
        num_cached_tokens: int = 0,
        **columns: np.ndarray,
    ) -> StepPlan:
        """Build a plan from the columns given; the others get their defaults, and num_short is counted."""
        num_rows = len(num_new)
        sizes = {Per.RANK: num_ranks, Per.ROW: num_rows, Per.TOKEN: int(num_new.sum()), Per.UPDATE: 0}
        keys = np.arange(num_rows) if keys is None else keys
        rank = _zeros(num_rows) if rank is None else rank
        columns["num_new"] = num_new
        for name, column in COLUMNS.items():
            if name not in columns:
                columns[name] = column.default(sizes[column.per])
        is_short = num_new <= width
        columns["num_short"] = (
            np.array([np.count_nonzero(is_short)], np.int32)
            if num_ranks == 1
            else np.bincount(rank[is_short], minlength=num_ranks).astype(np.int32)
        )
        flags = Flag(int(np.bitwise_or.reduce(columns["params"][:, Param.FLAGS])))
        return cls(keys, rank, width, [*loads], flags, num_cached_tokens, **columns)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def wants_logprobs(self) -> bool:
        return Flag.LOGPROBS in self.flags

    @property
    def wants_prompt_logprobs(self) -> bool:
        return Flag.PROMPT_LOGPROBS in self.flags


def columns_of(plan: type[StepPlan]) -> dict[str, Column]:
    """The columns that a class of plans declares, by name and in order."""
    hints = get_type_hints(plan, include_extras=True)
    return {name: note for name, hint in hints.items() for note in getattr(hint, "__metadata__", ())}


COLUMNS = columns_of(StepPlan)


def row_capacity(context_length: int, width: int) -> int:
    """Tokens that a row's page table must hold. Beyond the context it may compute drafts that are not needed: the last step
    planned begins before the end, one step of W tokens may be in flight before it, and it has W tokens itself."""
    return context_length + 2 * (width - 1)


@functools.cache
def empty_plan(num_ranks: int, width: int = 1) -> StepPlan:
    """A plan of no rows, which a warm-up runs."""
    return StepPlan.of(np.empty(0, np.int32), num_ranks=num_ranks, width=width)


class TokenScores(NamedTuple):
    """Log probabilities of n tokens under the model's own distribution, before bias, penalties and temperature."""

    chosen: np.ndarray  # f32[n]
    top_ids: np.ndarray  # i32[n, MAX_LOGPROBS], best first
    top_logprobs: np.ndarray  # f32[n, MAX_LOGPROBS]


@dataclasses.dataclass(frozen=True, slots=True)
class StepTokens:
    """A finished step on the host, in the plan's row order."""

    tokens: np.ndarray  # i32[S, W]
    num_accepted: np.ndarray  # i32[S] how many of a row's tokens are its own next ones: 1 .. W where it decodes, else 1
    logprobs: TokenScores | None  # of the tokens, n = S * W; None unless some row asked
    prompt_logprobs: TokenScores | None  # of the token after each packed one, n = T; None unless some row asked

    @property
    def has_scores(self) -> bool:
        return self.logprobs is not None or self.prompt_logprobs is not None


class Flight(Protocol):
    """A launched step, whose results are on their way."""

    @property
    def plan(self) -> StepPlan: ...

    def collect(self) -> StepTokens:
        """Wait for the step and bring its tokens to the host. Steps are collected in the order of their launch."""
        ...
