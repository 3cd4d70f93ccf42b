"""Builds a tokenizer from a sentencepiece `tokenizer.model`, a protobuf message whose few fields are read here.

Field numbers are those of sentencepiece_model.proto (https://github.com/google/sentencepiece).
"""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.protobuf import fields
from sgl_jax.text.sentencepiece_bpe import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    decode_spaces,
    sentencepiece_bpe,
)

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


@dataclasses.dataclass(frozen=True)
class SentencepieceTokenizer:
    """The tokenizer adds no bos by itself."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    unk_token: str


def load_sentencepiece(path: Path) -> SentencepieceTokenizer:
    """Raises ModelError for a file that is none, and for settings that `tokenizers` cannot follow exactly."""
    try:
        model = _fields(path.read_bytes())
        pieces = [_fields(piece) for piece in model.get(1, [])]
        trainer, normaliser = (_fields(model.get(number, [b""])[-1]) for number in (2, 3))
        texts = [_last(piece, 1, b"").decode() for piece in pieces]
    except (ValueError, struct.error, AttributeError) as error:
        raise ModelError(
            f"{path} is no sentencepiece model ({error}); give the model's tokenizer.json with --tokenizer-path"
        ) from error
    if not texts:
        raise ModelError(f"{path} has no pieces; give the model's tokenizer.json with --tokenizer-path")
    kinds = [_last(piece, 3, NORMAL) for piece in pieces]
    scores = [struct.unpack("<f", _last(piece, 2, b"\0\0\0\0"))[0] for piece in pieces]
    unk = texts[kinds.index(UNKNOWN)] if UNKNOWN in kinds else texts[_last(trainer, 40, 0)]
    if _last(trainer, 24, 0):
        raise ModelError(f"{path} treats whitespace as a suffix; give the model's tokenizer.json with --tokenizer-path")
    byte_fallback = bool(_last(trainer, 35, 0))
    vocabulary = Vocabulary(texts, kinds, scores, unk, byte_fallback, whole_words=USER_DEFINED in kinds)
    tokenizer = _model(vocabulary, _last(trainer, 3, _UNIGRAM), path)
    prefix, charsmap = bool(_last(normaliser, 3, 1)), _last(normaliser, 2, b"")
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if _last(normaliser, 4, 1):  # extra spaces are removed
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # User-defined pieces are cut out first, the longest before others. Spaces are ▁ by then: a piece that has some of its
    # own is never found, as in sentencepiece.
    own: list[str] = sorted(
        (text for text, kind in zip(texts, kinds, strict=True) if kind == USER_DEFINED), key=len, reverse=True
    )
    if own:
        pattern = "|".join([re.escape(text) for text in own])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    decode_spaces(tokenizer, prefix=prefix)
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(texts, kinds, strict=True)
            if kind in (CONTROL, UNKNOWN)
        ]
    )
    bos, eos = (_special(_last(trainer, number, default), texts, kinds) for number, default in ((41, 1), (42, 2)))
    return SentencepieceTokenizer(tokenizer, bos, eos, unk)


def _model(v: Vocabulary, kind: int, path: Path) -> Tokenizer:
    if kind == _BPE:
        return sentencepiece_bpe(v, str(path))
    if kind == _UNIGRAM:
        scored = list(zip(v.pieces, v.scores, strict=True))
        return Tokenizer(Unigram(scored, unk_id=v.pieces.index(v.unk), byte_fallback=v.byte_fallback))
    raise ModelError(f"{path} cuts text into words or characters; only BPE and unigram models are read")


def _special(token: int, texts: list[str], kinds: list[int]) -> str | None:
    """-1, which a protobuf has as a large number, means that there is none."""
    return texts[token] if token < len(texts) and kinds[token] == CONTROL else None


def _last(found: dict[int, list[Any]], number: int, default: Any) -> Any:
    return found.get(number, [default])[-1]


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Return a message's values by field number: varints as int, all else as bytes."""
    found: dict[int, list[Any]] = {}
    for number, value in fields(message):
        found.setdefault(number, []).append(value)
    return found
