"""What a user asks of a generation, and how it ended: plain host data shared by every room of the house."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import msgspec
import numpy as np

_MAX_INT = 2**31 - 1  # what a device row holds
MAX_LOGPROBS = 20  # OpenAI's limit; the step program always returns this many candidates
MAX_LOGIT_BIAS = 1024  # entries a device row can hold
MAX_STOP_TOKENS = 64  # token ids that can be held back until min_tokens
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # stop strings, and characters of one: each token's text is searched for all


class InvalidParameter(ValueError):
    """A request's parameter cannot be honoured. `param` names the field as the user wrote it."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop.

    Order on the device: logit_bias, penalties, temperature, top_k, top_p, min_p (Hugging Face's order).
    """

    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0  # eos and stop_token_ids cannot be sampled before
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None  # None: off; k: the sampled token's logprob and the k best
    prompt_logprobs: int | None = None  # the same for each prompt token
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stream_interval: int | None = None  # tokens per streamed update after the first; None: the server's

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidParameter for the first value outside its range."""
        self._check_ranges()
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidParameter(name, f"{name} has token id {token}; the vocabulary is 0..{vocab_size - 1}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParameter(
                "logit_bias", f"logit_bias has {len(self.logit_bias)} entries; the limit is {MAX_LOGIT_BIAS}"
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidParameter(
                "stop_token_ids",
                f"stop_token_ids has {len(self.stop_token_ids)} entries; the limit is {MAX_STOP_TOKENS}",
            )
        if isinstance(self.stop, str):
            raise InvalidParameter("stop", f"stop is the string {self.stop!r}; it must be a sequence of strings")
        if len(self.stop) > MAX_STOPS:
            raise InvalidParameter("stop", f"stop has {len(self.stop)} strings; the limit is {MAX_STOPS}")
        lengths = [len(each) for each in self.stop]
        if not all(lengths):
            raise InvalidParameter("stop", "a stop string must not be empty")
        if max(lengths, default=0) > MAX_STOP_LENGTH:
            raise InvalidParameter(
                "stop", f"a stop string has {max(lengths)} characters; the limit is {MAX_STOP_LENGTH}"
            )

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 1e4),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 1e-3, 1e3),
            ("min_tokens", 0, _MAX_INT),
            ("top_k", -1, _MAX_INT),
            ("n", 1, 128),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # not a number included
                raise InvalidParameter(name, f"{name} is {value}; it must be between {low} and {high}")
        if self.top_p == 0:
            raise InvalidParameter("top_p", "top_p is 0; it must be above 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidParameter("max_tokens", f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter("min_tokens", f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        if self.stream_interval is not None and self.stream_interval < 1:
            raise InvalidParameter(
                "stream_interval", f"stream_interval is {self.stream_interval}; it must be at least 1"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidParameter("seed", f"seed is {self.seed}; it must fit 64 bits")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InvalidParameter(name, f"{name} is {value}; it must be between 0 and {MAX_LOGPROBS}")
        if any(not math.isfinite(b) or abs(b) > 100 for b in self.logit_bias.values()):
            raise InvalidParameter("logit_bias", "logit_bias values must be between -100 and 100")


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request ended. `matched` is the stop token's id or the stop string, if one was the cause."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One generation inside the engine. While it runs, its tokens and counters live in the scheduler's row table."""

    key: int
    prompt: np.ndarray  # i32[prompt_len]
    params: SamplingParams
    namespace: str
    seed: int  # u32
    max_total_tokens: int  # prompt and output together
    stop_token_ids: np.ndarray  # i32, eos among them unless ignored
    arrival: int  # position in the order of arrival

    tokens: np.ndarray = dataclasses.field(init=False)  # i32: prompt plus output so far, current while not running
    row: int = -1  # in the row table; -1 while waiting
    admitted: bool = False  # it has had a row before
    announced: bool = False  # its first token has been reported
    num_cached_tokens: int = 0  # prompt tokens the prefix cache spared at first admission
    prompt_logprobs: list = dataclasses.field(default_factory=list)  # gathered chunk by chunk, by the engine core

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and not self.announced
