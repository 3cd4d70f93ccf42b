"""Builds sentencepiece's BPE as a `tokenizers` pipeline from the pieces, their kinds and scores."""

import dataclasses
import enum
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import merges_of


class Kind(enum.IntEnum):
    """Kind of a piece: SentencePiece.Type of sentencepiece_model.proto, and GGUF's token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of a vocabulary, in the order of their ids."""

    texts: Sequence[str]
    kinds: Sequence[int]  # Kind
    scores: Sequence[float]
    unk: str
    byte_fallback: bool
    whole_words: bool = False  # a word that is a piece stays whole, as user-defined pieces must


def sentencepiece_bpe(pieces: Pieces, source: str) -> Tokenizer:
    """Return a tokenizer that merges the adjacent pair that makes the piece of best score, as sentencepiece does.

    Raises ModelError, which names `source`, if two scores are equal: then the scores do not give the order of merges.
    """
    ids = {text: i for i, text in enumerate(pieces.texts) if pieces.kinds[i] != Kind.UNUSED}
    ranks = {text: -pieces.scores[i] for text, i in ids.items() if pieces.kinds[i] == Kind.NORMAL and len(text) > 1}
    if twice := [-rank for rank, count in Counter(ranks.values()).items() if count > 1]:
        raise ModelError(
            f"{source} has sentencepiece tokens of equal score ({twice[0]}), so the order of merges is not known; "
            "give the model's own tokenizer.json with --tokenizer-path"
        )
    options = {"byte_fallback": pieces.byte_fallback, "ignore_merges": pieces.whole_words}
    return Tokenizer(BPE(ids, merges_of(ranks), unk_token=pieces.unk, fuse_unk=True, **options))


def decode_spaces(tokenizer: Tokenizer, *, prefix: bool) -> None:
    """Turn ▁ into a space when decoding, and with `prefix` drop the one before the text."""
    to_text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)] if prefix else to_text)
