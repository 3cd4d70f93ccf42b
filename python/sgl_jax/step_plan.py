"""What one step computes: written by the scheduler, packed and run by the runtime, and broadcast between hosts as is."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from sgl_jax.request import Request


class Param(enum.IntEnum):
    """Columns of a row's sampling parameters, i32; the float ones hold the bits of a float32.

    A parameter of SamplingParams names its column; FLAGS alone belongs to none.
    """

    SEED = 0
    FLAGS = 1
    TOP_K = 2  # vocabulary size or more: off
    TEMPERATURE = 3  # float from here on; 0: greedy
    TOP_P = 4
    MIN_P = 5
    PRESENCE = 6
    FREQUENCY = 7
    REPETITION = 8


class Flag(enum.IntFlag):
    """Bits of Param.FLAGS: the parts of the sampler that a row needs."""

    LOGPROBS = 1
    PENALTIES = 2
    BIAS = 4  # logit_bias or min_tokens
    PROMPT_LOGPROBS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class RowLoad:
    """State a row gets before the step, in a dispatch of its own: the uncommon part of an admission."""

    row: int
    pages: np.ndarray | None  # the row's whole page table so far (page ids of its rank), after a prefix hit
    request: Request | None  # given when its penalties, logit_bias or min_tokens need device state
    num_cached_tokens: int = 0  # what the prefix hit spared


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """S rows by data rank, ascending; within a rank those with one new token first. T new tokens in row order."""

    keys: np.ndarray  # i64[S] request keys
    rows: np.ndarray  # i32[S] lines of the device state, numbered over all ranks
    rank: np.ndarray  # i32[S] the data rank whose pages hold the row, 0 .. M-1
    start: np.ndarray  # i32[S] tokens computed before this step
    num_new: np.ndarray  # i32[S] tokens computed by this step, >= 1
    num_short: np.ndarray  # i32[M] how many rows of a rank, from its first on, have num_new == 1
    samples: np.ndarray  # bool[S] the last new token's logits are sampled
    from_device: np.ndarray  # bool[S] the one new token is the row's last sample, known to the device first
    next_token: np.ndarray  # i32[S] the prompt token after the last new one; -1 when there is none
    tokens: np.ndarray  # i32[T]; where from_device, ignored
    params: np.ndarray  # i32[S, len(Param)]
    page_updates: np.ndarray  # i32[3, U] (row, index in its page table, page id of the row's rank)
    loads: list[RowLoad]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def wants_logprobs(self) -> bool:
        return bool((self.params[:, Param.FLAGS] & Flag.LOGPROBS).any())

    @property
    def wants_prompt_logprobs(self) -> bool:
        return bool((self.params[:, Param.FLAGS] & Flag.PROMPT_LOGPROBS).any())
