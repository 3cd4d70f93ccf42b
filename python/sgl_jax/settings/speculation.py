"""Speculative decoding as the flags ask for it: SGLang's --speculative-* flags, or vLLM's --speculative-config."""

import dataclasses
from typing import Literal

Algorithm = Literal["NGRAM", "EAGLE", "EAGLE3", "NEXTN", "STANDALONE"]


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Request for speculative decoding, checked as far as it can be without the model."""

    algorithm: Algorithm
    draft_model_path: str | None  # None with NGRAM and NEXTN
    num_drafts: int  # W - 1, tokens that a step verifies in each row beside the last one
    max_batch_size: int | None  # most decoding requests of a data rank that speculate; None: decided for the device
    min_ngram: int = 1  # tokens of the shortest and the longest n-gram that is looked up
    max_ngram: int = 4
