"""The native request and answer format: what POST /generate and Engine.generate share.

Sampling parameters carry the names of the SGLang family (max_new_tokens, sampling_seed, …); answers are
{"text", "output_ids", "meta_info"}, cumulative when streamed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sgl_jax.engine.generation import GenerationRequest, Update
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.request import FinishReason, InvalidParameter, SamplingParams
from sgl_jax.text.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 128
LOWEST_LOGPROB = -9999.0  # JSON has no -inf

# native name -> ours, where they differ
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_NATIVE_NAME = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "skip_special_tokens",
    "stream_interval",
)
NAMES = (*_RENAMED, *_SAME, "max_tokens", "min_tokens", "no_stop_trim")


def sampling_params(given: Mapping[str, Any] | SamplingParams | None) -> tuple[SamplingParams, bool]:
    """The parameters in our names, and whether no token is to be generated (max_new_tokens 0: only score the prompt).

    Raises InvalidParameter with the name as the user wrote it.
    """
    if isinstance(given, SamplingParams):
        return given, False
    values: dict[str, Any] = {"max_tokens": DEFAULT_MAX_NEW_TOKENS}
    seen: dict[str, str] = {}
    for name, value in (given or {}).items():
        if name not in NAMES:
            raise InvalidParameter(name, f"{name} is not a sampling parameter; they are {', '.join(NAMES)}")
        ours = _RENAMED.get(name, name)
        if ours in seen:
            raise InvalidParameter(name, f"{name} and {seen[ours]} are the same parameter; give one")
        seen[ours] = name
        if value is None:
            continue
        if ours == "no_stop_trim":
            ours = "include_stop_str_in_output"
        elif ours == "stop" and isinstance(value, str):
            value = (value,)
        values[ours] = value
    score_only = values["max_tokens"] == 0 and values["max_tokens"] is not False
    if score_only:
        values["max_tokens"] = 1
    try:
        return msgspec.convert(values, SamplingParams, str_keys=True), score_only
    except msgspec.ValidationError as error:
        raise _readable(error, seen) from error


def _readable(error: msgspec.ValidationError, seen: Mapping[str, str]) -> InvalidParameter:
    """msgspec says "Expected `float`, got `str` - at `$.temperature`"."""
    text, _, path = str(error).partition(" - at `")
    ours = path.strip("`").removeprefix("$.").partition("[")[0]
    name = seen.get(ours, ours) or "sampling_params"
    return InvalidParameter(name, f"{name}: {text}")


def native_name(error: InvalidParameter) -> InvalidParameter:
    """The same error, speaking of max_new_tokens where ours is max_tokens."""
    text = str(error)
    for ours, native in _NATIVE_NAME.items():
        text = text.replace(f"{ours} ", f"{native} ")
    return type(error)(_NATIVE_NAME.get(error.param, error.param), text)


class LogprobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a native request says about logprobs."""

    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = -1  # from this prompt token on; -1: only the output's
    return_text_in_logprobs: bool = False

    def apply(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        if not self.return_logprob:
            if self.top_logprobs_num:
                raise InvalidParameter("top_logprobs_num", "top_logprobs_num needs return_logprob")
            return params
        if not -1 <= self.logprob_start_len <= num_prompt_tokens:
            raise InvalidParameter(
                "logprob_start_len",
                f"logprob_start_len is {self.logprob_start_len}; it must be -1 or within the {num_prompt_tokens} prompt tokens",
            )
        return msgspec.structs.replace(
            params,
            logprobs=self.top_logprobs_num,
            prompt_logprobs=None if self.logprob_start_len < 0 else self.top_logprobs_num,
        )


class Answer:
    """One choice's answer, growing with each update."""

    def __init__(self, request: GenerationRequest, request_id: str, tokenizer: Tokenizer, options: LogprobOptions):
        self.text = ""
        self.output_ids: list[int] = []
        self.finish: FinishReason | None = None
        self._request, self._id = request, request_id
        self._tokenizer, self._options = tokenizer, options
        self._started = time.perf_counter()
        self._num_cached = 0
        self._output = _Scores(tokenizer, options)
        self._input = _Scores(tokenizer, options)

    def add(self, update: Update) -> None:
        self.text += update.text
        self.output_ids += update.token_ids
        self.finish = update.finish
        self._num_cached = update.num_cached_tokens
        if self._options.return_logprob:
            self._output.extend(update.token_ids, update.logprobs)
            if update.prompt_logprobs is not None:
                start = self._options.logprob_start_len
                self._input.extend(self._request.prompt_ids[start:], update.prompt_logprobs[start:])

    def to_dict(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self._id,
            "finish_reason": None if self.finish is None else finish_dict(self.finish, len(self.output_ids)),
            "prompt_tokens": len(self._request.prompt_ids),
            "completion_tokens": len(self.output_ids),
            "cached_tokens": self._num_cached,
            "e2e_latency": time.perf_counter() - self._started,
        }
        if self._options.return_logprob:
            meta["input_token_logprobs"] = self._input.chosen
            meta["output_token_logprobs"] = self._output.chosen
            if self._options.top_logprobs_num:
                meta["input_top_logprobs"] = self._input.top
                meta["output_top_logprobs"] = self._output.top
        return {"text": self.text, "output_ids": list(self.output_ids), "meta_info": meta}


class _Scores:
    """Logprobs as [logprob, token id, text or None]."""

    def __init__(self, tokenizer: Tokenizer, options: LogprobOptions):
        self._text = tokenizer.token_text if options.return_text_in_logprobs else lambda token: None
        self.chosen: list[tuple[float | None, int, str | None]] = []
        self.top: list[list[tuple[float, int, str | None]] | None] = []

    def extend(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> None:
        for token, score in zip(tokens, scores, strict=True):
            if score is None:
                self.chosen.append((None, token, self._text(token)))
                self.top.append(None)
                continue
            self.chosen.append((finite(score.logprob), token, self._text(token)))
            best = zip(score.top_ids, score.top_logprobs, strict=True)
            self.top.append([(finite(logprob), other, self._text(other)) for other, logprob in best])


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def finish_dict(finish: FinishReason, num_tokens: int) -> dict[str, Any]:
    if finish.type == "length":
        return {"type": "length", "length": num_tokens}
    if finish.type == "abort":
        return {"type": "abort", "message": finish.message or "aborted"}
    return {"type": "stop", "matched": finish.matched}
