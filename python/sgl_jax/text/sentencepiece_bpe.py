"""Sentencepiece's BPE as a `tokenizers` pipeline, from the pieces, their kinds and scores."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe_merges import merges_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type; GGUF numbers alike


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    pieces: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    unk: str
    byte_fallback: bool
    whole_words: bool = False  # what is cut out before merging and is a piece stays whole: user-defined pieces do


def sentencepiece_bpe(v: Vocabulary, source: str) -> Tokenizer:
    """Sentencepiece merges the adjacent pair whose joined token scores best. That is a merge list as long as no two scores
    are equal. Raises ModelError, naming `source`."""
    ids = {piece: i for i, piece in enumerate(v.pieces) if v.kinds[i] != UNUSED}
    joined = [(v.scores[i], piece) for piece, i in ids.items() if v.kinds[i] == NORMAL and len(piece) > 1]
    twice = [score for score, count in Counter(score for score, _ in joined).items() if count > 1]
    if twice:
        raise ModelError(
            f"{source} has sentencepiece tokens of equal score ({twice[0]}), so the order of merges is not known; "
            "give the model's own tokenizer.json with --tokenizer-path"
        )
    ranks = {piece: -score for score, piece in joined}
    return Tokenizer(
        BPE(
            ids,
            merges_of(ranks),
            unk_token=v.unk,
            fuse_unk=True,
            byte_fallback=v.byte_fallback,
            ignore_merges=v.whole_words,
        )
    )


def decode_spaces(tokenizer: Tokenizer, *, prefix: bool) -> None:
    """▁ is a space, and with `prefix` the one before the text is no part of it."""
    to_text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)] if prefix else to_text)
