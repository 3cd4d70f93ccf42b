"""Builds a tokenizer from a sentencepiece `tokenizer.model`, a protobuf message whose few fields are read here.

Field numbers are those of sentencepiece_model.proto (https://github.com/google/sentencepiece).
"""

import re
import struct
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.protobuf import read_message
from sgl_jax.text.sentencepiece_bpe import Kind, Pieces, decode_spaces, sentencepiece_bpe
from sgl_jax.text.vocabulary import Vocabulary, present

_INSTEAD = "give the model's tokenizer.json with --tokenizer-path"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType


def load_sentencepiece(path: Path, prefix_once: bool = False) -> Vocabulary:
    """Build the vocabulary. Raises ModelError for damaged files, and for settings that `tokenizers` lacks.

    A text gets a space in front where the file asks for it, and so does each part behind a special token, unless
    `prefix_once`.
    """
    try:
        model = read_message(path.read_bytes())
        stored = [read_message(piece) for piece in model.get(1, [])]
        trainer, normaliser = (read_message(model.get(number, [b""])[-1]) for number in (2, 3))
        texts = [_last(piece, 1, b"").decode() for piece in stored]
    except (ValueError, struct.error, AttributeError) as error:
        raise ModelError(f"{path} is no sentencepiece model ({error}); {_INSTEAD}") from error
    if not texts:
        raise ModelError(f"{path} has no pieces; {_INSTEAD}")
    if _last(trainer, 24, 0):
        raise ModelError(f"{path} treats whitespace as a suffix; {_INSTEAD}")
    kinds = [_last(piece, 3, Kind.NORMAL) for piece in stored]
    scores = [struct.unpack("<f", _last(piece, 2, b"\0\0\0\0"))[0] for piece in stored]
    unk = texts[kinds.index(Kind.UNKNOWN)] if Kind.UNKNOWN in kinds else texts[_last(trainer, 40, 0)]
    byte_fallback = bool(_last(trainer, 35, 0))
    pieces = Pieces(texts, kinds, scores, unk, byte_fallback, whole_words=Kind.USER_DEFINED in kinds)
    tokenizer = _model(pieces, _last(trainer, 3, _UNIGRAM), path)
    prefix = bool(_last(normaliser, 3, 1))
    tokenizer.normalizer = _normalizer(_last(normaliser, 2, b""), _last(normaliser, 4, 1), prefix and not prefix_once)
    once = prefix and prefix_once
    cuts: list[Any] = [pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)] if once else []
    # User-defined pieces are cut out first, the longest before others. Spaces have become ▁ by then, so a piece with a
    # space is never found; sentencepiece does the same.
    own: list[str] = [t for t, kind in zip(texts, kinds, strict=True) if kind == Kind.USER_DEFINED]
    if own:
        pattern = "|".join([re.escape(text) for text in sorted(own, key=len, reverse=True)])
        cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    decode_spaces(tokenizer, prefix=prefix)
    special: list[str] = [t for t, kind in zip(texts, kinds, strict=True) if kind in (Kind.CONTROL, Kind.UNKNOWN)]
    tokenizer.add_special_tokens(special)
    bos, eos = (_special(_last(trainer, number, default), pieces) for number, default in ((41, 1), (42, 2)))
    named = present(bos_token=bos, eos_token=eos, unk_token=unk)
    return Vocabulary(tokenizer, named, is_sentencepiece=True)


def _model(pieces: Pieces, kind: int, path: Path) -> Tokenizer:
    if kind == _BPE:
        return sentencepiece_bpe(pieces, str(path))
    if kind == _UNIGRAM:
        scored = list(zip(pieces.texts, pieces.scores, strict=True))
        return Tokenizer(Unigram(scored, unk_id=pieces.texts.index(pieces.unk), byte_fallback=pieces.byte_fallback))
    raise ModelError(f"{path} cuts text into words or characters; only BPE and unigram models are read")


def _normalizer(charsmap: bytes, removes_extra_spaces: int, prefix: bool) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if removes_extra_spaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _special(token: int, pieces: Pieces) -> str | None:
    """Return a control piece, None for an id that is none. An id of -1, "no token", reads as a large number."""
    return pieces.texts[token] if token < len(pieces.texts) and pieces.kinds[token] == Kind.CONTROL else None


def _last(found: dict[int, list[Any]], number: int, default: Any) -> Any:
    return found.get(number, [default])[-1]
