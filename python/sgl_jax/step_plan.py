"""The plan of one step and its results: written by the scheduler, packed and run by the runtime.

A plan is a table of columns. Each column is declared once, in StepPlan. The vector that crosses to the device, the inputs
of the step program, the empty plan and the builder all derive from COLUMNS.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterable
from typing import Annotated, NamedTuple, Protocol, get_type_hints

import numpy as np

from sgl_jax.request import Request


class Param(enum.IntEnum):
    """Columns of a row's sampling parameters, i32; the float ones hold the bits of a float32.

    A field of SamplingParams names its column; ADAPTER and FLAGS belong to no field.
    """

    SEED = 0
    ADAPTER = enum.auto()  # the slot of the row's adapter, counted from 1; 0: the model itself
    FLAGS = enum.auto()
    TOP_K = enum.auto()  # vocabulary size or more: off
    TEMPERATURE = enum.auto()  # float from here on; 0: greedy
    TOP_P = enum.auto()
    MIN_P = enum.auto()
    PRESENCE = enum.auto()
    FREQUENCY = enum.auto()
    REPETITION = enum.auto()


class RowFlag(enum.IntFlag):
    """Bits of Param.FLAGS: the parts of the step that a row needs or does without."""

    LOGPROBS = 1
    PENALTIES = 2
    BIAS = 4  # logit_bias or min_tokens
    PROMPT_LOGPROBS = 8
    NO_DRAFTS = 16
    GRAMMAR = 32  # only the tokens of the row's mask can be sampled


class Per(enum.Enum):
    """The things that a column has one entry for."""

    RANK = "rank"  # M entries
    ROW = "row"  # S
    TOKEN = "token"  # T
    UPDATE = "page update"  # U, along the last axis


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """Shape and type of a column. It is packed as i32, padded with zeros, or with the spare row's number where its values
    are row numbers."""

    per: Per
    fill: int = 0  # every value of the column in a plan that is built without it
    width: int = 1  # values of an entry; an array of width 1 has no axis for them
    is_bool: bool = False
    names_rows: bool = False  # its values, or the first value of each entry, are row numbers

    def shape(self, n: int) -> tuple[int, ...]:
        """Shape of the column with n entries."""
        if self.width == 1:
            return (n,)
        return (self.width, n) if self.per is Per.UPDATE else (n, self.width)


@dataclasses.dataclass(frozen=True, slots=True)
class RowLoad:
    """Device state of a row that the plan's columns do not carry, written before the step: the uncommon part of an
    admission."""

    row: int
    pages: np.ndarray | None  # after a prefix hit, the row's whole page table so far (page ids of its rank)
    # Set if its penalties, logit_bias or min_tokens need device state, or its tokens are kept there.
    request: Request | None
    mask: np.ndarray | None = None  # i32[ceil(V / 32)] a bit for each token that its grammar allows next


class AdapterLoad(NamedTuple):
    """Adapter that is put into a slot before the step."""

    slot: int
    source: str  # names it to the runner of every host


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """S rows with T new tokens in row order. Rows are sorted by data rank. Within a rank, decoding rows come first, then
    other rows with at most W new tokens, then rows with more.

    A decoding row computes its last token and W - 1 drafts. Only the device knows these tokens, and how many of the previous
    drafts were accepted. So for a decoding row `start` is an upper bound, and its entries in `tokens` are ignored.
    """

    keys: np.ndarray  # i64[S] request keys
    rank: np.ndarray  # i32[S] the data rank whose pages hold the row, 0 .. M-1
    width: int  # W
    most_rows: int  # rows of a rank for which the width was chosen
    loads: list[RowLoad]
    adapter_loads: list[AdapterLoad]
    flags: RowFlag  # the flags of all rows together
    num_cached_tokens: int  # prompt tokens that the requests admitted by this plan found in the prefix cache
    num_short: Annotated[np.ndarray, Column(Per.RANK)]  # i32[M] rows with num_new <= W, which come first in a rank
    rows: Annotated[np.ndarray, Column(Per.ROW, names_rows=True)]  # i32[S] lines of the state, over all ranks
    start: Annotated[np.ndarray, Column(Per.ROW)]  # i32[S] tokens computed before this step
    num_new: Annotated[np.ndarray, Column(Per.ROW)]  # i32[S] tokens computed by this step, >= 1
    # bool[S] a token is sampled after the row's last new token; in a decoding row, after each new token
    samples: Annotated[np.ndarray, Column(Per.ROW, 1, is_bool=True)]
    from_device: Annotated[np.ndarray, Column(Per.ROW, is_bool=True)]  # bool[S] the row decodes
    next_token: Annotated[np.ndarray, Column(Per.ROW, -1)]  # i32[S] the prompt token after the last new one, or -1
    params: Annotated[np.ndarray, Column(Per.ROW, width=len(Param))]  # i32[S, len(Param)]
    tokens: Annotated[np.ndarray, Column(Per.TOKEN)]  # i32[T]
    # i32[3, U] (row, index in its page table, page id in the row's rank)
    page_updates: Annotated[np.ndarray, Column(Per.UPDATE, width=3, names_rows=True)]

    @classmethod
    def of(
        cls,
        num_new: np.ndarray,
        *,
        num_ranks: int = 1,
        width: int = 1,
        most_rows: int = 0,
        keys: np.ndarray | None = None,
        rank: np.ndarray | None = None,
        loads: Iterable[RowLoad] = (),
        adapter_loads: Iterable[AdapterLoad] = (),
        num_cached_tokens: int = 0,
        **columns: np.ndarray,
    ) -> StepPlan:
        """Build a plan from the given columns. num_short is counted, rows and keys are 0 .. S-1 by default, and other
        columns have their fill value."""
        num_rows = len(num_new)
        sizes = {Per.RANK: num_ranks, Per.ROW: num_rows, Per.TOKEN: int(num_new.sum()), Per.UPDATE: 0}
        keys = np.arange(num_rows) if keys is None else keys
        rank = np.zeros(num_rows, np.int32) if rank is None else rank
        is_short = num_new <= width
        if num_ranks == 1:
            num_short = np.array([np.count_nonzero(is_short)], np.int32)
        else:
            num_short = np.bincount(rank[is_short], minlength=num_ranks).astype(np.int32)
        columns |= {"num_new": num_new, "num_short": num_short}
        if "rows" not in columns:
            columns["rows"] = np.arange(num_rows, dtype=np.int32)
        for name, column in COLUMNS.items():
            if name not in columns:
                dtype = np.bool_ if column.is_bool else np.int32
                columns[name] = np.full(column.shape(sizes[column.per]), column.fill, dtype)
        flags = RowFlag(int(np.bitwise_or.reduce(columns["params"][:, Param.FLAGS])))
        return cls(keys, rank, width, most_rows, [*loads], [*adapter_loads], flags, num_cached_tokens, **columns)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def wants_logprobs(self) -> bool:
        return RowFlag.LOGPROBS in self.flags

    @property
    def wants_prompt_logprobs(self) -> bool:
        return RowFlag.PROMPT_LOGPROBS in self.flags


COLUMNS: dict[str, Column] = {
    name: column
    for name, hint in get_type_hints(StepPlan, include_extras=True).items()
    for column in getattr(hint, "__metadata__", ())
}


def pages_per_row(context_length: int, width: int, page_size: int, lookahead: int = 0) -> int:
    """Return the number of pages that a row's page table must hold. A row may compute needless drafts beyond the context: at
    the end, up to two steps of W tokens each are in flight. `lookahead`: tokens beyond a step's own whose KV it writes."""
    return -(-(context_length + 2 * (width - 1) + lookahead) // page_size)


def mask_words(vocab_size: int) -> int:
    """Return the number of 32-bit words of a grammar's mask."""
    return -(-vocab_size // 32)


@functools.cache
def empty_plan(num_ranks: int, width: int = 1) -> StepPlan:
    """Plan without rows, for the warm-up."""
    return StepPlan.of(np.empty(0, np.int32), num_ranks=num_ranks, width=width)


class TokenScores(NamedTuple):
    """Log probabilities of n tokens under the model's own distribution, before bias, penalties and temperature."""

    chosen: np.ndarray  # f32[n]
    top_ids: np.ndarray  # i32[n, MAX_LOGPROBS], best first
    top_logprobs: np.ndarray  # f32[n, MAX_LOGPROBS]


@dataclasses.dataclass(frozen=True, slots=True)
class StepTokens:
    """Results of a finished step on the host, in the plan's row order."""

    tokens: np.ndarray  # i32[S, W]
    num_accepted: np.ndarray  # i32[S] how many of a row's tokens continue its sequence: 1 .. W if it decodes, else 1
    num_drafted: np.ndarray  # i32[S] how many drafts of a row were verified: 0 .. W - 1 if it decodes, else 0
    logprobs: TokenScores | None  # n = S * W sampled tokens; None unless a row asked
    prompt_logprobs: TokenScores | None  # n = T, the token after each packed token; None unless a row asked
    hidden: np.ndarray | None = (
        None  # f32[S, D] pooled states, in a launch that makes vectors and a step that wants them
    )


class Flight(Protocol):
    """A launched step that has not been collected."""

    @property
    def plan(self) -> StepPlan: ...

    def collect(self) -> StepTokens:
        """Wait for the step and copy its tokens to the host. Steps are collected in the order of their launch."""
        ...
