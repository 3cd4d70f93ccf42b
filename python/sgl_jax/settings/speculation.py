"""Speculative decoding as the flags ask for it: SGLang's --speculative-* flags, or vLLM's --speculative-config."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, cast

from sgl_jax.settings.flag_parser import FlagError, option_named
from sgl_jax.settings.speculative_flags import SpeculativeFlags
from sgl_jax.settings.vllm_speculation import in_vllm_words, translated

Algorithm = Literal["NGRAM", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE"]

_MAX_NGRAM = 4
_WITHOUT_MODEL = ("NGRAM", "NEXTN")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Request for speculative decoding, checked as far as it can be without the model."""

    algorithm: Algorithm
    draft_model_path: str | None  # None with NGRAM and NEXTN
    # W - 1, tokens that a step verifies in each row beside the last one; None (NGRAM alone): decided for the device
    num_drafts: int | None
    max_batch_size: int | None  # most decoding requests of a data rank that speculate; None: decided for the device
    min_ngram: int = 1  # tokens of the shortest and the longest n-gram that is looked up
    max_ngram: int = _MAX_NGRAM


def speculation_of(flags: SpeculativeFlags, model_path: str, tp_size: int, dp_size: int) -> Speculation | None:
    """Return what the flags ask for; None: no drafts. Raises FlagError for flags that do not fit together."""
    config = flags.speculative_config
    if config is None:
        return _speculation(flags, model_path, dp_size)
    if len(given := _given(flags)) > 1:
        raise FlagError(given[0], f"{given[0]} cannot be had with --speculative-config, which says all; leave one out")
    try:
        return _speculation(translated(config, tp_size), model_path, dp_size)
    except FlagError as error:
        raise FlagError("--speculative-config", f"--speculative-config: {in_vllm_words(str(error))}") from None


def _given(flags: SpeculativeFlags) -> list[str]:
    """Return the flags that are not left at their defaults."""
    fields = dataclasses.fields(SpeculativeFlags)
    return [option_named(each.name) for each in fields if getattr(flags, each.name) != each.default]


def _speculation(flags: SpeculativeFlags, model_path: str, dp_size: int) -> Speculation | None:
    if flags.speculative_algorithm is None:
        if given := _given(flags):
            raise FlagError(given[0], f"{', '.join(given)} would have no effect without --speculative-algorithm")
        return None
    algorithm, path = flags.speculative_algorithm.upper(), flags.speculative_draft_model_path
    if algorithm in ("EAGLE", "NEXTN") and path in (None, model_path):
        algorithm, path = "NEXTN", None
    for text in _misfits(flags, algorithm, path):
        raise FlagError(text.split()[0], text)
    steps, verified = flags.speculative_num_steps, flags.speculative_num_draft_tokens
    rows = flags.speculative_disable_by_batch_size
    shortest = flags.speculative_ngram_min_match_window_size or 1
    return Speculation(
        cast(Algorithm, algorithm),
        path,
        steps or (verified - 1 if verified else None if algorithm == "NGRAM" else 3),
        rows and -(-rows // dp_size),
        shortest,
        flags.speculative_ngram_max_match_window_size or max(shortest, _MAX_NGRAM),
    )


def _misfits(flags: SpeculativeFlags, algorithm: str, path: str | None) -> Iterator[str]:
    """Say which flags do not fit together, a sentence each that begins with the flag."""
    if algorithm in _WITHOUT_MODEL and path is not None:
        yield f"--speculative-draft-model-path is {path}; {algorithm} drafts without a model of its own, leave it out"
    if algorithm not in _WITHOUT_MODEL and path is None:
        yield f"--speculative-algorithm is {algorithm}; --speculative-draft-model-path must name the draft model"
    steps, verified = flags.speculative_num_steps, flags.speculative_num_draft_tokens
    if steps and verified and verified != steps + 1:
        which = f"--speculative-num-draft-tokens is {verified}"
        yield f"{which}; it must be one more than --speculative-num-steps, which is {steps}: leave one out"
    if algorithm != "NGRAM":
        for option in (each for each in _given(flags) if "ngram" in each):
            yield f"{option} has no effect with --speculative-algorithm {algorithm}; leave it out"
    shortest = flags.speculative_ngram_min_match_window_size
    longest = flags.speculative_ngram_max_match_window_size
    if shortest and longest and shortest > longest:
        which = f"--speculative-ngram-min-match-window-size is {shortest}"
        yield f"{which}; it must not be above --speculative-ngram-max-match-window-size, which is {longest}"
