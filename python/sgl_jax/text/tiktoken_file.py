"""Builds a tokenizer from a tiktoken vocabulary: one line for each token, its bytes in base64 and its rank.

tiktoken joins the neighbours whose joined token has the lowest rank; a word that is a token stays whole.
The file has neither the pattern that cuts text into words nor the special tokens; they are known by the file's name.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe_merges import merges_of
from sgl_jax.text.byte_level import CHAR_OF_BYTE, QWEN2_WORDS, by_regex


@dataclasses.dataclass(frozen=True)
class _Kind:
    split: Callable[[], pre_tokenizers.PreTokenizer]
    special_tokens: tuple[str, ...]  # their ids follow those of the file
    eos_token: str
    template: str  # the name of one of ours


@dataclasses.dataclass(frozen=True)
class TiktokenTokenizer:
    tokenizer: Tokenizer
    eos_token: str
    template: str


_QWEN1 = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
)  # tokenization_qwen.py
_KINDS = {"qwen.tiktoken": _Kind(by_regex(QWEN2_WORDS), _QWEN1, eos_token="<|endoftext|>", template="qwen")}


def load_tiktoken(path: Path) -> TiktokenTokenizer:
    """Raises ModelError."""
    kind = _KINDS.get(path.name)
    if kind is None:
        raise ModelError(
            f"{path} is a tiktoken vocabulary, which does not say how it cuts text into words; known are "
            f"{', '.join(_KINDS)}; give the model's tokenizer.json with --tokenizer-path"
        )
    ranks = _read(path)
    spelled = {"".join(CHAR_OF_BYTE[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(spelled, merges_of(spelled), ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = kind.split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in kind.special_tokens])
    return TiktokenTokenizer(tokenizer, kind.eos_token, kind.template)


def _read(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path}, line {number}: not a token in base64 and its rank") from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{path} has no token for {len(missing)} of the 256 bytes, {missing[0]} among them")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; is the file whole?")
    return ranks
