"""Native request and answer format, which POST /generate and Engine.generate share.

Sampling parameters carry the names of the SGLang family (max_new_tokens, sampling_seed, …); answers are
{"text", "output_ids", "meta_info"}, cumulative when streamed.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence

import msgspec

from sgl_jax.engine.generation import GenerationRequest, Update
from sgl_jax.engine.messages import DraftCounts, TokenLogprobs
from sgl_jax.request import (
    GRAMMAR_KINDS,
    Api,
    FinishReason,
    InvalidParameter,
    Json,
    Names,
    SamplingParams,
    parameters_of,
)
from sgl_jax.text.tokenizer import Tokenizer

DEFAULT_MAX_NEW_TOKENS = 128
LOWEST_LOGPROB = -9999.0  # JSON has no -inf

type Params = Mapping[str, Json] | SamplingParams | GenerationRequest


@functools.cache
def names_in(api: Api, cls: type[SamplingParams] = SamplingParams) -> tuple[Names, Names]:
    """Return our names by those of the API, and the API's preferred names by ours."""
    parameters = parameters_of(cls)
    ours = {name: each.name for each in parameters for name in each.names(api)}
    return ours, {each.name: each.names(api)[0] for each in parameters if each.names(api)}


def in_our_names[T](
    given: Mapping[str, T], api: Api, cls: type[SamplingParams] = SamplingParams
) -> tuple[dict[str, T], Names]:
    """Return a request's values by our names, and the request's names by ours. None counts as not given.

    Raises InvalidParameter for a name that the API does not have, and for a parameter under two names.
    """
    ours, preferred = names_in(api, cls)
    values: dict[str, T] = {}
    names = dict(preferred)
    for name, value in given.items():
        if name not in ours:
            raise InvalidParameter(name, f"{name} is not a sampling parameter; they are {', '.join(ours)}")
        if value is None:
            continue
        if ours[name] in values:
            raise InvalidParameter(name, f"{name} and {names[ours[name]]} are the same parameter; give one")
        values[ours[name]], names[ours[name]] = value, name
    return values, names


def as_grammar_text(value: Json) -> str:
    """Return a grammar's text; objects, such as a JSON schema, as JSON."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def sampling_params(params: Params | None, cls: type[SamplingParams] = SamplingParams) -> GenerationRequest:
    """Read parameters in the native names. Raises InvalidParameter with the name as the user wrote it."""
    if isinstance(params, GenerationRequest):
        return params
    if isinstance(params, SamplingParams):
        return GenerationRequest([], params)
    values, names = in_our_names(params or {}, "native", cls)
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = (stop,)
    values |= {kind: as_grammar_text(values[kind]) for kind in GRAMMAR_KINDS if isinstance(values.get(kind), Mapping)}
    try:
        read = msgspec.convert(values, cls, str_keys=True)
    except msgspec.ValidationError as error:
        raise _readable(error, names) from error
    return GenerationRequest([], read, default_max_tokens=DEFAULT_MAX_NEW_TOKENS, names=names)


def _readable(error: msgspec.ValidationError, names: Names) -> InvalidParameter:
    """Convert msgspec's "Expected `float`, got `str` - at `$.temperature`", or "… at `key` in `$.logit_bias`"."""
    text = str(error).partition(" - at `")[0]
    path = re.search(r"\$\.(\w+)", str(error))
    name = names.get(path[1], path[1]) if path else "sampling_params"
    return InvalidParameter(name, f"{name}: {text}")


class LogprobOptions(msgspec.Struct, frozen=True):
    """Fields of a native request that concern logprobs."""

    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = -1  # from this prompt token on; -1: only the output's
    return_text_in_logprobs: bool = False

    def apply(self, given: GenerationRequest, num_prompt_tokens: int) -> GenerationRequest:
        """Return the request with these options. Raises InvalidParameter."""
        if not self.return_logprob:
            if self.top_logprobs_num:
                raise InvalidParameter("top_logprobs_num", "top_logprobs_num needs return_logprob")
            return given
        if not -1 <= (start := self.logprob_start_len) <= num_prompt_tokens:
            text = f"logprob_start_len is {start}; it must be -1 or within the {num_prompt_tokens} prompt tokens"
            raise InvalidParameter("logprob_start_len", text)
        top = self.top_logprobs_num
        params = msgspec.structs.replace(given.params, logprobs=top, prompt_logprobs=None if start < 0 else top)
        names = {**given.names, "logprobs": "top_logprobs_num", "prompt_logprobs": "top_logprobs_num"}
        return dataclasses.replace(given, params=params, names=names)


class NativeAnswer:
    """Answer of one choice, which grows with each update."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, options: LogprobOptions):
        self._request, self._options = request, options
        self._text = ""
        self._output_ids: list[int] = []
        self._finish: FinishReason | None = None
        self._started = time.perf_counter()
        self._num_cached = 0
        self._drafts = DraftCounts()
        self._output = _Scores(tokenizer, options)
        self._input = _Scores(tokenizer, options)

    def add(self, update: Update) -> None:
        self._text += update.text
        self._output_ids += update.token_ids
        self._finish = update.finish
        self._num_cached = update.num_cached_tokens
        self._drafts = update.drafts
        if self._options.return_logprob:
            self._output.extend(update.token_ids, update.logprobs)
            if update.prompt_logprobs is not None:
                start = self._options.logprob_start_len
                self._input.extend(self._request.prompt_ids[start:], update.prompt_logprobs[start:])

    def to_dict(self) -> dict[str, Json]:
        meta: dict[str, Json] = {
            "id": self._request.request_id,
            "finish_reason": None if self._finish is None else finish_dict(self._finish, len(self._output_ids)),
            "prompt_tokens": len(self._request.prompt_ids),
            "completion_tokens": len(self._output_ids),
            "cached_tokens": self._num_cached,
            "e2e_latency": time.perf_counter() - self._started,
        }
        if (drafts := self._drafts).steps:  # with the names of SGLang
            counts = zip(("spec_verify_ct", "spec_proposed_drafts", "spec_accepted_drafts"), drafts, strict=True)
            meta |= {**dict(counts), "spec_accept_length": drafts.accept_length, "spec_accept_rate": drafts.accept_rate}
        if self._options.return_logprob:
            meta["input_token_logprobs"] = self._input.chosen
            meta["output_token_logprobs"] = self._output.chosen
            if self._options.top_logprobs_num:
                meta["input_top_logprobs"] = self._input.top
                meta["output_top_logprobs"] = self._output.top
        return {"text": self._text, "output_ids": list(self._output_ids), "meta_info": meta}


class _Scores:
    """Lists of [logprob, token id, text or None]: for each token, and for the best tokens in its stead."""

    def __init__(self, tokenizer: Tokenizer, options: LogprobOptions):
        self._spell = tokenizer.token_text if options.return_text_in_logprobs else lambda token: None
        self.chosen: list[tuple[float | None, int, str | None]] = []
        self.top: list[list[tuple[float, int, str | None]] | None] = []

    def extend(self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None]) -> None:
        for token, score in zip(tokens, scores, strict=True):
            if score is None:
                self.chosen.append((None, token, self._spell(token)))
                self.top.append(None)
                continue
            self.chosen.append((finite(score.logprob), token, self._spell(token)))
            best = zip(score.top_ids, score.top_logprobs, strict=True)
            self.top.append([(finite(logprob), other, self._spell(other)) for other, logprob in best])


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def finish_dict(finish: FinishReason, num_tokens: int) -> dict[str, Json]:
    if finish.type == "length":
        return {"type": "length", "length": num_tokens}
    if finish.type == "abort":
        return {"type": "abort", "message": finish.message or "aborted"}
    return {"type": "stop", "matched": finish.matched}
